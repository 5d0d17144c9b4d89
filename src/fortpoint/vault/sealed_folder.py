"""Where sealed models lie, and the wrapped key beside each.

    sealed/smollm2-135m/
        model.sealed     every file of the model, encrypted (seal_format.py)
        key.json         {"model": digest, "key": the model's key, wrapped (key_encryption.py)}

Rotation wraps the same key again under another KEK, in one step, and encrypts nothing anew.

Not protected here: that a folder is there. Who can write it can remove it, or put an older sealing
of the same model back; the engine's lease names the model's digest, which that does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from fortpoint.errors import ModelError, SealBroken
from fortpoint.vault import atomic_file
from fortpoint.vault.key_encryption import KEY_BYTES, KeyEncryption, WrappedKey
from fortpoint.vault.model_folder import Manifest, model_path
from fortpoint.vault.seal_format import read_envelope

SEALED_FILE = "model.sealed"
KEY_FILE = "key.json"
_MAX_KEY_FILE_BYTES = 64 * 1024


class KeyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model`` is the digest that the key is bound to."""

    model: str
    key: WrappedKey

    @classmethod
    def wrap(cls, model_key: bytes, digest: str, kek: KeyEncryption) -> KeyRecord:
        return cls(digest, kek.wrap(model_key, _context(digest)))

    @classmethod
    def read(cls, folder: Path) -> KeyRecord:
        """Raises ``ModelError`` where there is none, ``SealBroken`` where it is damaged."""
        try:
            with (folder / KEY_FILE).open("rb") as file:
                return msgspec.json.decode(file.read(_MAX_KEY_FILE_BYTES), type=cls)
        except FileNotFoundError:
            raise ModelError(
                f"{folder.name!r} is not sealed here; seal it with `fortpoint vault seal`"
            ) from None
        except OSError as error:
            raise ModelError(f"{KEY_FILE} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise SealBroken(f"{KEY_FILE} of {folder.name} is damaged; restore it") from None

    def unwrap(self, kek: KeyEncryption) -> bytes:
        """The model's key. Raises ``KeyUnavailable`` or ``SealBroken``."""
        key = kek.unwrap(self.key, _context(self.model))
        if len(key) != KEY_BYTES:
            raise SealBroken("the wrapped key opens to something that is no key")
        return key

    def write(self, folder: Path) -> None:
        atomic_file.replace(folder / KEY_FILE, msgspec.json.encode(self))


def sealed_dir(home: Path) -> Path:
    return home / "sealed"


def sealed_path(home: Path, name: str) -> Path:
    """Where the sealed model of this name lies. Raises ``ModelError`` for a name that is none."""
    return sealed_dir(home) / model_path(home, name).name


def list_sealed(home: Path) -> Iterator[Manifest]:
    """What each sealed model says it is; nothing of it is authenticated before it is opened."""
    for file in sorted(sealed_dir(home).glob(f"[!.]*/{SEALED_FILE}")):
        with file.open("rb") as opened:
            yield read_envelope(opened, file.stat().st_size).header.manifest


def rotate(folder: Path, old: KeyEncryption, new: KeyEncryption) -> None:
    """Wrap the model's key under ``new``. Where that fails, ``old`` still opens it."""
    record = KeyRecord.read(folder)
    KeyRecord.wrap(record.unwrap(old), record.model, new).write(folder)


def _context(digest: str) -> bytes:
    return b"model key\0" + digest.encode()
