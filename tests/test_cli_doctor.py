"""``fortpoint doctor`` on this machine, on broken homes, beside a fake engine."""

from __future__ import annotations

import asyncio
import builtins
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fortpoint import hardening
from fortpoint.cli import doctor
from fortpoint.engine import protocol

application = typer.Typer()
application.command()(doctor.doctor)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("FORTPOINT_HOME", str(home))
    return home


@pytest.fixture
def engine(home: Path) -> Iterator[None]:
    """An engine that only answers ``Describe``, with one protection off."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    (home / "run").mkdir()
    path = home / "run" / "engine.sock"
    serving = asyncio.run_coroutine_threadsafe(asyncio.start_unix_server(_answer, path), loop)
    server = serving.result(timeout=5)
    yield
    loop.call_soon_threadsafe(server.close)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(timeout=5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    loop.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request = await protocol.read_request(reader)
    assert isinstance(request, protocol.Describe)
    description = protocol.Description(
        id=request.id,
        model="smollm2-135m",
        digest="0" * 64,
        architecture="llama",
        dtype="float32",
        max_context=4096,
        created=0,
        pid=4242,
        running=0,
        waiting=0,
        protections={"landlock": False, "seccomp": True},
    )
    writer.write(protocol.encode(description))
    await writer.drain()
    await reader.read()
    writer.close()


def states(output: str) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(output)["checks"]}


def test_doctor_on_this_machine_prints_every_line_and_exits_0(home: Path) -> None:
    result = CliRunner().invoke(application, [], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for name in ("python", "platform", "cores", "memory", "disk", "home", "torch", "precision"):
        assert name in result.output
    assert "make serve" in result.output


def test_doctor_json_is_one_object_with_a_next_step_for_whatever_is_not_ok(home: Path) -> None:
    result = CliRunner().invoke(application, ["--json"])
    found = states(result.output)
    assert found["engine"]["state"] == "off"
    assert found["home"] == {
        "name": "home",
        "state": "ok",
        "finding": f"{home} mode 0700",
        "next": None,
    }
    kernels = ("float32", "bfloat16", "int8", "int4")
    assert found["precision at 1 rows"]["finding"].endswith(kernels)
    assert all(check["next"] for check in found.values() if check["state"] != "ok")


@pytest.mark.usefixtures("engine")
def test_doctor_with_a_running_engine_shows_the_protections_it_measured(home: Path) -> None:
    found = {check.name: check for check in doctor.check_engine(home)}
    assert found["engine"].finding == "smollm2-135m in float32, process 4242"
    assert found["engine seccomp"].state == "ok"
    assert found["engine landlock"].state == "off"
    assert "engine.sandbox=require" in (found["engine landlock"].next or "")


def test_doctor_without_torch_is_broken_and_exits_1(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_torch(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    result = CliRunner().invoke(application, ["--json"])
    assert result.exit_code == 1
    assert states(result.output)["torch"]["state"] == "broken"


def test_home_open_to_others_is_a_warning_with_the_command(home: Path) -> None:
    home.chmod(0o755)
    check = doctor.check_home(home)
    assert (check.state, check.next) == ("warn", f"chmod 700 {home}")


def test_home_that_is_a_file_is_broken(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    assert doctor.check_home(tmp_path / "home").state == "broken"


def test_home_missing_is_off_and_its_disk_is_the_parents(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet"
    assert doctor.check_home(missing).state == "off"
    assert doctor.check_disk(missing).state in ("ok", "warn")


def test_disk_almost_full_is_broken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(free=1024))
    assert doctor.check_disk(home).state == "broken"


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(("abi", "state"), [(0, "off"), (3, "warn"), (7, "ok")])
def test_landlock_by_abi(monkeypatch: pytest.MonkeyPatch, abi: int, state: str) -> None:
    monkeypatch.setattr(hardening, "landlock_abi", lambda: abi)
    check = doctor.check_landlock()
    assert check.state == state
    assert (check.next is None) == (state == "ok")


def test_seccomp_unavailable_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "seccomp_available", lambda: False)
    assert doctor.check_seccomp().state == "off"
