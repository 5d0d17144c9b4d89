from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from fortpoint import supervisor
from fortpoint.errors import ConfigError
from fortpoint.supervisor import Child


def _child(code: str) -> Child:
    return Child("child", [sys.executable, "-c", code], {})


async def test_child_that_dies_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    said: list[str] = []
    child = _child(f"open({str(log)!r}, 'a').write('x'); import os; os.kill(os.getpid(), 9)")
    running = asyncio.create_task(child.keep_running(said.append))
    async with asyncio.timeout(20):
        while len(said) < 3:
            await asyncio.sleep(0.01)
    await child.stop()
    await running
    assert len(log.read_text()) >= 3
    assert said[0] == "child ended (signal SIGKILL); starting it again in 0.2 s"
    assert "in 0.4 s" in said[1]


async def test_child_that_exits_with_2_is_not_started_again() -> None:
    said: list[str] = []
    async with asyncio.timeout(20):
        assert await _child("raise SystemExit(2)").keep_running(said.append) == 2
    assert said == []


async def test_child_that_ignores_the_request_to_stop_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "_STOP_TIMEOUT_S", 0.3)
    ready = tmp_path / "ready"
    child = _child(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"open({str(ready)!r}, 'w').close(); time.sleep(60)"
    )
    running = asyncio.create_task(child.keep_running(lambda _: None))
    async with asyncio.timeout(20):
        while not ready.exists():
            await asyncio.sleep(0.01)
    start = time.monotonic()
    await child.stop()
    assert await running == -9
    assert time.monotonic() - start < 10


def test_children_get_no_secret_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("LANG", "C.UTF-8")
    assert "HF_TOKEN" not in supervisor._environment()
    assert supervisor._environment()["LANG"] == "C.UTF-8"
    assert set(supervisor._environment()) < set(os.environ)


def test_listen_on_a_port_in_use_says_what_to_do() -> None:
    with supervisor.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*PORT="):
            supervisor.listen("127.0.0.1", port)
