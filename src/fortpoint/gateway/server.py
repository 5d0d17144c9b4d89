"""The gateway's process: builds the real services, serves until told to stop.

    python -m fortpoint.gateway.server --fd 5 --engine ~/.fortpoint/run/engine.sock

The listening socket is inherited, so that a restarted gateway loses no connection that waits
in its queue. Configuration comes from the file and the environment that the supervisor gives.
Logs are one line a request on standard error, without texts, keys or query strings.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
import uvloop

from fortpoint import config as configuration
from fortpoint.access.keys import KeyRing
from fortpoint.audit.log import AuditLog
from fortpoint.config import Config
from fortpoint.engine.client import EngineClient
from fortpoint.errors import FortPointError
from fortpoint.gateway.app import create_app
from fortpoint.gateway.services import Services
from fortpoint.guard.guard import Guard
from fortpoint.store.database import Database

_GRACE_S = 5
_KEEP_ALIVE_S = 30
_BACKLOG = 1024


def run(config: Config, socket_fd: int, engine_socket: Path) -> None:
    """Serve on the inherited socket until SIGTERM or SIGINT; at most five seconds of grace."""
    with (
        socket.socket(fileno=socket_fd) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        listener.setblocking(False)
        runner.run(serve(config, listener, engine_socket))


async def serve(config: Config, listener: socket.socket, engine_socket: Path) -> None:
    """The same on a socket at hand, inside a running loop."""
    async with real_services(config, engine_socket) as services:
        server = uvicorn.Server(
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
        await server.serve(sockets=[listener])


@contextlib.asynccontextmanager
async def real_services(config: Config, engine_socket: Path) -> AsyncIterator[Services]:
    """Everything behind the gateway, closed in reverse order. The log is flushed last but one."""
    async with contextlib.AsyncExitStack() as stack:
        database = Database.in_home(config.home_path)
        stack.push_async_callback(database.close)
        await database.migrate()
        audit = await AuditLog.open(database, config.home_path)
        stack.push_async_callback(audit.close)
        engine = EngineClient(engine_socket)
        stack.push_async_callback(engine.close)
        guard = Guard.load(config.guard) if config.guard.enabled else None
        yield Services(config, engine, guard, KeyRing(database), audit)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line of the process; 1 when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m fortpoint.gateway.server")
    parser.add_argument("--fd", type=int, required=True, help="inherited listening socket")
    parser.add_argument("--engine", type=Path, required=True, help="the engine's Unix socket")
    parser.add_argument("--config", type=Path, help="configuration file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        config = configuration.load(options.config, flags=options.set)
        run(config, options.fd, options.engine)
    except FortPointError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
