"""The gateway's process: gives up what it does not need, builds the services, serves.

    python -m fortpoint.gateway.server --socket-fd 5 --engine-socket HOME/run/engine.sock \\
        --parent-pid 4242 --config '{"home": "..."}'

The listening socket is inherited and outlives the process, so that a restart loses no
connection that waits in its queue. The order is the point:

1. give up capabilities, tracing, and every file but the interpreter's and the home's
   ``state`` folder (so the weights in the same home too), and forbid system calls
2. only then load the guard, start the loop, open the services, serve

Logs are one line a request on standard error, without texts, keys or query strings.
Not protected here: the database itself. Whoever makes this process run code can write it;
the record's checkpoints show that it was changed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from fortpoint import hardening
from fortpoint.access.keys import KeyRing
from fortpoint.access.presets import PresetBook
from fortpoint.audit.log import AuditLog
from fortpoint.audit.prover import Prover, known_witnesses
from fortpoint.config import Config
from fortpoint.engine.client import Engine, EngineClient
from fortpoint.engine.upstream.observer import is_upstream, reads_along
from fortpoint.engine.upstream.target import Target, load_targets
from fortpoint.errors import ConfigError, FortPointError, SandboxError, VerificationError
from fortpoint.gateway import policy_source
from fortpoint.gateway.app import create_app
from fortpoint.gateway.policy_in_force import in_force
from fortpoint.gateway.policy_source import PolicySource
from fortpoint.gateway.services import Services
from fortpoint.gateway.watch_ledger import WatchLedger
from fortpoint.guard.canaries import load_canaries
from fortpoint.store.location import Location, locate

_GRACE_S = 4
_LAST_WORDS_S = 1.0
_KEEP_ALIVE_S = 30
_BACKLOG = 1024
_HOPELESS = 2
_DNS_PORT = 53
_SWITCH_S = 0.0005
_COLLECT = (20_000, 20, 50)

# The listening socket is an internet socket, so ``no_network`` cannot hold here.
_REQUIRED = {*hardening.REQUIRED, "no_outbound"} - {"no_network"}


def run(config: Config, socket_fd: int, engine_socket: Path, parent_pid: int | None = None) -> None:
    """Serve on the inherited socket until SIGTERM or SIGINT; then at most five seconds more.

    With ``parent_pid`` the process is confined, for good, and dies with that parent. Upstreams'
    keys, the guard's policy and its canaries are read before that, for the files that may hold
    them are out of reach after it.
    """
    targets = load_targets(config.upstream) if is_upstream(config) else ()
    canaries = load_canaries(config.guard.canaries)
    location = locate(config)
    policy = policy_source.load(config)
    if parent_pid is not None:
        _confine(config, parent_pid, (*targets, *policy.targets), location)
    with (
        socket.socket(fileno=socket_fd) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        listener.setblocking(False)
        runner.run(serve(config, listener, engine_socket, targets, canaries, location, policy))


async def serve(
    config: Config,
    listener: socket.socket,
    engine_socket: Path,
    targets: Sequence[Target] = (),
    canaries: Mapping[str, str] | None = None,
    location: Location | None = None,
    policy: PolicySource | None = None,
) -> None:
    """The same on a socket at hand, inside a running loop."""
    async with real_services(
        config, engine_socket, targets, canaries, location, policy
    ) as services:
        _collect_rarely()
        server = _Server(
            uvicorn.Config(
                create_app(services),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        server.stop_on_signals()
        await server.serve(sockets=[listener])
        await server.last_words()


class _Server(uvicorn.Server):
    """Stops without re-raising the signal, so that the log is closed after the last request."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop_on_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    async def last_words(self) -> None:
        """Let requests that were cut off write their entries."""
        if tasks := set(self.server_state.tasks):
            await asyncio.wait(tasks, timeout=_LAST_WORDS_S)

    def _stop(self) -> None:
        self.should_exit = True


@contextlib.asynccontextmanager
async def real_services(
    config: Config,
    engine_socket: Path,
    targets: Sequence[Target] = (),
    canaries: Mapping[str, str] | None = None,
    location: Location | None = None,
    policy: PolicySource | None = None,
) -> AsyncIterator[Services]:
    """Everything behind the gateway, closed in reverse order: engine, log, database."""
    # Loading numpy starts threads, and confining files must come before the first of them.
    from fortpoint.guard.guard import Guard

    async with contextlib.AsyncExitStack() as stack:
        database = (location or locate(config)).open()
        stack.push_async_callback(database.close)
        await database.migrate()
        audit = await AuditLog.open(database, config.state_path)
        stack.push_async_callback(audit.close)
        engine = _engine(config, engine_socket, targets)
        stack.push_async_callback(engine.close)
        guard = None
        if config.guard.enabled:
            guard = Guard.load(config.guard, canaries=canaries)
        source = policy or policy_source.load(config)
        services = Services(
            config,
            engine,
            guard,
            KeyRing(database),
            audit,
            PresetBook(database),
            WatchLedger(database),
            Prover(database, audit.verifier_key, known_witnesses(config.audit.witnesses)),
            policy=await in_force(source, config, database, audit, stack),
        )
        stack.push_async_callback(services.watch.flush)
        yield services


def _engine(config: Config, engine_socket: Path, targets: Sequence[Target]) -> Engine:
    """The embedded one's client, or the upstreams with (for probes) that one as observer."""
    if not is_upstream(config):
        return EngineClient(engine_socket)
    from fortpoint.engine.upstream.engine import UpstreamEngine

    observer = EngineClient(engine_socket) if reads_along(config) else None
    return UpstreamEngine(config.upstream, targets, observer, hardening.protections())


def _confine(
    config: Config, parent_pid: int, targets: Sequence[Target], location: Location
) -> None:
    """Keep only the state folder: neither the weights nor anything else of the home.

    With upstreams or a database server also what names and certificates need, and TCP to the
    ports of these.
    """
    named = bool(targets) or location.is_named
    ports = {*_ports(targets), *([location.port] if location.port else [])}
    ports |= {_DNS_PORT} if location.is_named else set()
    config.state_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    hardening.harden_process(parent_pid=parent_pid)
    hardening.confine_files(
        read=[
            *hardening.python_paths(),
            *hardening.runtime_paths(),
            *(hardening.outbound_paths() if named else ()),
        ],
        write=[config.state_path],
        connect=sorted(ports),
    )
    hardening.forbid_syscalls(hardening.GATEWAY_OUTBOUND if ports else hardening.GATEWAY)
    if config.engine.sandbox == "require":
        hardening.require_protections(sorted(_REQUIRED - ({"no_outbound"} if ports else set())))


def _collect_rarely() -> None:
    """What is there now lives as long as the process; walking it again and again costs each
    request a tenth of its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)


def _ports(targets: Sequence[Target]) -> list[int]:
    """The upstreams', and the one where long answers about names come from."""
    names = {_DNS_PORT} if any(not target.is_address for target in targets) else set()
    return sorted({target.port for target in targets} | names)


def _config_of(text: str) -> Config:
    try:
        return msgspec.json.decode(text, type=Config)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--config: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """Run as a process. Exit code 2 means that a new start would fail in the same way."""
    parser = argparse.ArgumentParser(prog="python -m fortpoint.gateway.server")
    parser.add_argument("--socket-fd", type=int, required=True, help="inherited listening socket")
    parser.add_argument("--engine-socket", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, help="process that must be the parent")
    parser.add_argument("--config", required=True, help="the whole configuration as JSON")
    options = parser.parse_args(arguments)
    # The record's thread lets go of the interpreter at each statement, and would wait this long
    # (5 ms by default) behind a busy loop to get it back: five times for each batch of entries.
    sys.setswitchinterval(_SWITCH_S)
    # No line says these, and looking them up costs more than writing it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("fortpoint").setLevel(logging.INFO)
    try:
        config = _config_of(options.config)
        run(config, options.socket_fd, options.engine_socket, options.parent_pid)
    except FortPointError as error:
        print(f"gateway: {error.message}", file=sys.stderr, flush=True)
        hopeless = isinstance(error, ConfigError | SandboxError | VerificationError)
        return _HOPELESS if hopeless else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
