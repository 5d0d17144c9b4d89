"""The gateway as a process of its own: confined, small, over the real database and log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from fakes import DIGEST, MODEL, FakeEngine, Script
from fortpoint.access.keys import KeyRing
from fortpoint.config import Config, Guard
from fortpoint.engine import protocol
from fortpoint.engine.protocol import Describe, Generate, Proceed
from fortpoint.errors import EngineError
from fortpoint.store.database import Database
from fortpoint.store.tables import audit_entries
from fortpoint.supervisor import GATEWAY_ENVIRONMENT

_TOKENS = tuple(f" {number}" for number in range(40))


class _Socket:
    """A ``FakeEngine`` behind a Unix socket, enough of it for these tests."""

    def __init__(self, path: Path) -> None:
        self.engine = FakeEngine(Script(_TOKENS, token_s=0.01))
        self._path = path

    async def serve(self, ready: threading.Event, stop: threading.Event) -> None:
        server = await asyncio.start_unix_server(self._handle, self._path)
        ready.set()
        async with server:
            await asyncio.to_thread(stop.wait)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams = {}
        async with asyncio.TaskGroup() as group:
            while (request := await protocol.read_request(reader)) is not None:
                if isinstance(request, Describe):
                    description = await self.engine.describe()
                    described = msgspec.structs.replace(description, id=request.id)
                    writer.write(protocol.encode(described))
                elif isinstance(request, Generate):
                    streams[request.id] = await self.engine.generate(request)
                    group.create_task(self._send(streams[request.id], writer))
                elif isinstance(request, Proceed):
                    await streams[request.id].proceed()
        writer.close()

    async def _send(self, events: AsyncIterator[protocol.Event], w: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EngineError, ConnectionError):
            async for event in events:
                w.write(protocol.encode(event))
                if isinstance(event, protocol.Done):
                    return


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    config: Config
    url: str
    secret: str

    def ask(self, **more: object) -> dict[str, object]:
        return {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], **more}

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.secret}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)

    def entries(self) -> int:
        return asyncio.run(_count(self.config.state_path))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    config = Config(home=str(tmp_path), guard=Guard(enabled=False))
    secret = asyncio.run(_make_key(config.state_path))
    path = tmp_path / "engine.sock"
    ready, stop = threading.Event(), threading.Event()
    engine = threading.Thread(target=lambda: asyncio.run(_Socket(path).serve(ready, stop)))
    engine.start()
    ready.wait(5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fortpoint.gateway.server"),
                *("--socket-fd", str(listener.fileno()), "--engine-socket", str(path)),
                *("--parent-pid", str(os.getpid())),
                *("--config", msgspec.json.encode(config).decode()),
            ],
            pass_fds=[listener.fileno()],
            env={**os.environ, **GATEWAY_ENVIRONMENT},
            stderr=subprocess.PIPE,
            text=True,
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield Gateway(process, config, url, secret)
        finally:
            process.kill()
            process.communicate(timeout=10)
            stop.set()
            engine.join(10)


def test_process_answers_and_records_over_the_real_services(gateway: Gateway) -> None:
    with gateway.client() as client:
        answer = client.post("/v1/chat/completions", json=gateway.ask(max_tokens=5)).json()
        wrong = client.get("/v1/models", headers={"authorization": "Bearer sk-fp-wrong"})
        models = client.get("/v1/models").json()

    assert answer["usage"]["completion_tokens"] == 5
    assert len(answer["fortpoint"]["audit"]["leaf_hash"]) == 64
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert models["data"][0]["digest"] == DIGEST
    assert gateway.entries() == 3


def test_process_stays_under_200_megabytes(gateway: Gateway) -> None:
    with gateway.client() as client:
        for _ in range(20):
            client.post("/v1/chat/completions", json=gateway.ask(max_tokens=2))
        process = psutil.Process(gateway.process.pid)

    assert process.memory_info().rss < 200 * 1024 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_is_confined(gateway: Gateway) -> None:
    with gateway.client() as client:
        client.get("/health/live")
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()

    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status


def test_process_told_to_stop_ends_soon_and_records_what_it_cut_off(
    gateway: Gateway, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    with gateway.client() as client:
        client.get("/health/ready")
        with client.stream(
            "POST", "/v1/chat/completions", json=gateway.ask(stream=True, max_tokens=40)
        ) as response:
            lines = response.iter_lines()
            next(lines)
            started = time.monotonic()
            gateway.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        code = gateway.process.wait(timeout=10)

    assert code == 0
    assert time.monotonic() - started < 6
    assert "data: [DONE]" in rest  # it had the time to end
    assert gateway.entries() == 1


def test_process_with_a_bad_configuration_says_that_a_new_start_is_hopeless(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fortpoint.gateway.server"),
            *("--socket-fd", "0", "--engine-socket", str(tmp_path / "e"), "--config", "{"),
        ],
        capture_output=True,
        check=False,
        text=True,
    )

    assert done.returncode == 2
    assert "Traceback" not in done.stderr


async def _make_key(state: Path) -> str:
    database = Database.in_home(state)
    await database.migrate()
    try:
        return (await KeyRing(database).create("ada", "customer")).secret
    finally:
        await database.close()


async def _count(state: Path) -> int:
    database = Database.in_home(state)
    try:
        async with database.connect() as connection:
            return len((await connection.execute(audit_entries.select())).all())
    finally:
        await database.close()
