"""The folder that holds all state, and the lock that keeps it to one server.

home/
    adapters/        LoRA adapters, a folder each (only the engine process reads them)
    features/        dictionaries and directions (only the engine process reads them)
    fortpoint.db     keys and the record
    keys/            what signs the record
    models/          weights (only the engine process reads them)
    run/             sockets of running processes
    sealed/          models whose files are encrypted, with their wrapped keys
    serve.lock       held, and naming its process, while a server runs
    vault/           leases, and the wrapped secret that their marks are made from
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fortpoint.errors import ConfigError, HomeInUse

_MAX_SOCKET_PATH = 107  # bytes in sockaddr_un, less the final zero


class Home:
    """Paths beneath one home. Making it makes the folders, for their owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def engine_socket(self) -> Path:
        return self.path / "run" / "engine.sock"

    @property
    def features(self) -> Path:
        return self.path / "features"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def state(self) -> Path:
        return self.path / "state"

    def make(self) -> None:
        """Create what is missing. Raises ``ConfigError`` where that cannot be."""
        if len(os.fsencode(self.engine_socket)) > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"FORTPOINT_HOME is too long for a socket's path: {self.path}; "
                "choose a shorter one (at most about 90 characters)"
            )
        try:
            for folder in (self.path, self.path / "models", self.path / "run", self.state):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cannot use {self.path} as home: {error.strerror}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home for this process. Raises ``HomeInUse`` while another holds it."""
        descriptor = os.open(self.path / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise HomeInUse(
                    f"another server (process {holder}) uses {self.path}; stop it, "
                    "or set FORTPOINT_HOME to another folder"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)
