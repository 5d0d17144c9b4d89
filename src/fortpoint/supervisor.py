"""Starts the engine (where one is needed) and the gateway, restarts what dies, stops cleanly.

It answers no request and reads no weights. A child that exits with code 2 says that a new
start would fail in the same way: then everything stops. Otherwise it is started again, after
a pause that doubles while it keeps dying.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path

import msgspec

from fortpoint.config import Config
from fortpoint.engine.client import EngineClient
from fortpoint.engine.protocol import Description
from fortpoint.engine.upstream.observer import is_upstream
from fortpoint.engine.upstream.target import key_variables
from fortpoint.engine.worker import EngineSpec
from fortpoint.errors import ConfigError, EngineUnavailable
from fortpoint.features.shipped import ARTEFACTS as SHIPPED
from fortpoint.features.watched import watched
from fortpoint.gateway import policy_source
from fortpoint.guard.canaries import canary_variables
from fortpoint.home import Home
from fortpoint.store.address import address_variable
from fortpoint.vault.model_folder import model_path

_STOP_TIMEOUT_S = 8.0
_START_TIMEOUT_S = 120.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0  # a child that lived this long starts again without a longer pause
_HOPELESS = 2

# What children get of our environment: nothing that may hold a secret, but for the gateway the
# variables that ``upstream.api_keys`` and ``guard.canaries`` name.
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "PYTHONWARNINGS")

# Memory of finished requests goes back to the system; sequences come and go.
_ENGINE_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 20),
}

# Small vectors only: a second BLAS thread would cost memory and buy nothing.
GATEWAY_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}

# Where the certificates lie that upstreams are verified with.
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


class Child:
    """One process that is kept running."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._pass_fds = tuple(pass_fds)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def keep_running(self, say: Callable[[str], None]) -> int:
        """Start, and start again; returns the exit code once it is stopped or hopeless."""
        pause, code = _FIRST_PAUSE_S, 0
        while not self._stopping:
            started = time.monotonic()
            # Its own process group: Ctrl-C reaches the supervisor alone, which stops in order.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environment,
                pass_fds=self._pass_fds,
                process_group=0,
            )
            code = await self._process.wait()
            if code == _HOPELESS or self._told_to_stop():
                break
            pause = _FIRST_PAUSE_S if time.monotonic() - started > _STEADY_S else pause
            say(f"{self.name} ended ({_cause(code)}); starting it again in {pause:.1f} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)
        return code

    def _told_to_stop(self) -> bool:
        return self._stopping

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL for a process that does not go."""
        self._stopping = True
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, which outlives every gateway process. Raises ``ConfigError``."""
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "free the port or set another one with PORT=..."
        ) from None


def engine_child(config: Config, home: Home, probes: Path | None) -> Child:
    spec = EngineSpec(
        config=config.engine,
        model=str(model_path(home.path, config.engine.model)),
        socket=str(home.engine_socket),
        probes=None if probes is None else str(probes),
        parent_pid=os.getpid(),
        features=str(home.features),
        adapters=str(home.adapters),
        shipped=str(SHIPPED),
        targets=tuple(watched(config)),
    )
    command = _module("fortpoint.engine.worker", msgspec.json.encode(spec).decode())
    return Child("engine", command, _environment() | _ENGINE_MALLOC)


def gateway_child(config: Config, home: Home, listener: socket.socket) -> Child:
    command = _module(
        "fortpoint.gateway.server",
        *("--socket-fd", str(listener.fileno()), "--engine-socket", str(home.engine_socket)),
        *("--parent-pid", str(os.getpid()), "--config", msgspec.json.encode(config).decode()),
    )
    environment = _environment() | GATEWAY_ENVIRONMENT | _environment(address_variable(config))
    environment |= _environment(canary_variables(config.guard.canaries))
    if second_stage := policy_source.variables(config):
        environment |= _environment((*_CERTIFICATES, *second_stage))
    if is_upstream(config):
        environment |= _environment((*_CERTIFICATES, *key_variables(config.upstream)))
    return Child("gateway", command, environment, [listener.fileno()])


async def run(
    engine: Child | None,
    gateway: Child,
    announcement: Coroutine[object, object, None],
    say: Callable[[str], None],
) -> int:
    """Until SIGINT or SIGTERM (returns 0), or until a child cannot run (returns 1).

    ``announcement`` runs beside the children, from their start.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # The gateway stops first, so that running requests end and are recorded.
    children = [gateway] if engine is None else [gateway, engine]
    running = [asyncio.create_task(child.keep_running(say)) for child in children]
    ready = asyncio.create_task(announcement)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([*running, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        ready.cancel()
        if stop.is_set():
            say("stopping")
        for child in children:
            await child.stop()
        await asyncio.gather(*running, return_exceptions=True)
        stopped.cancel()
    return 0 if stop.is_set() else 1


async def announce(
    engine_socket: Path | None,
    gateway: tuple[str, int],
    on_ready: Callable[[Description | None], None],
    say: Callable[[str], None],
) -> None:
    """Call ``on_ready`` once the gateway answers and, if one runs, the engine describes itself."""
    client = None if engine_socket is None else EngineClient(engine_socket)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                with contextlib.suppress(EngineUnavailable, OSError):
                    engine = None if client is None else await client.describe()
                    if await _answers(*gateway):
                        on_ready(engine)
                        return
                await asyncio.sleep(0.05)
    except TimeoutError:
        say(f"nothing is ready after {_START_TIMEOUT_S:.0f} s; see the messages above")
    finally:
        if client is not None:
            await client.close()


async def _answers(host: str, port: int) -> bool:
    """Whether the gateway says that it is live."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    finally:
        writer.close()


def _module(name: str, *arguments: str) -> list[str]:
    """Run a module of ours; ``-P`` keeps the current folder off its path."""
    return [sys.executable, "-P", "-m", name, *arguments]


def _environment(names: Iterable[str] = _PASSED_ON) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
