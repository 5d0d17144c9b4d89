"""A small file that appears whole or not at all, readable by its owner alone."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from fortpoint.errors import StorageError


def replace(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step, synced. Raises ``StorageError``."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(draft, path)
        sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path.name}: {error.strerror}; make room, then do it again"
        ) from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
