"""The secret that every mark's key is made from: one for a home, wrapped by the KEK.

Kept apart from the models' own keys: it must outlive any sealing, for a leak may show years
later. Losing it loses every trace.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec

from fortpoint.errors import SealBroken, StorageError
from fortpoint.vault import atomic_file
from fortpoint.vault.key_encryption import KEY_BYTES, KeyEncryption, WrappedKey

_CONTEXT = b"mark master"
_MAX_FILE_BYTES = 64 * 1024


def master_path(home: Path) -> Path:
    return home / "vault" / "marks.json"


def load(home: Path, kek: KeyEncryption) -> bytes:
    """Raises ``SealBroken``, ``KeyUnavailable``, or ``StorageError`` where there is none."""
    try:
        with master_path(home).open("rb") as file:
            wrapped = msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=WrappedKey)
    except FileNotFoundError:
        raise StorageError(
            "there is no secret of marks here; the first `fortpoint vault lease issue` makes it"
        ) from None
    except OSError as error:
        raise StorageError(f"marks.json cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise SealBroken("marks.json is damaged; restore it from a backup") from None
    master = kek.unwrap(wrapped, _CONTEXT)
    if len(master) != KEY_BYTES:
        raise SealBroken("the secret of marks opens to something that is none")
    return master


def load_or_create(home: Path, kek: KeyEncryption) -> bytes:
    """A new one only where there are no leases yet that an old one would be needed for."""
    if not master_path(home).exists() and not (home / "vault" / "leases.json").exists():
        _write(home, kek.wrap(secrets.token_bytes(KEY_BYTES), _CONTEXT))
    return load(home, kek)


def rotate(home: Path, old: KeyEncryption, new: KeyEncryption) -> None:
    """Wrap the same secret under ``new``; nothing where there is none."""
    if master_path(home).exists():
        _write(home, new.wrap(load(home, old), _CONTEXT))


def _write(home: Path, wrapped: WrappedKey) -> None:
    atomic_file.replace(master_path(home), msgspec.json.encode(wrapped))
