"""The log's key pair on disk.

``keys/audit.ed25519`` is the private key (PKCS 8, PEM, 0600); ``keys/audit.pub`` is its public
half as a C2SP verifier key, to be handed to auditors. The log's name (its origin) is the
beginning of the public key's SHA-256, so that it is as random as the key and cannot be taken
from it.

Not protected here: whoever reads the private key can sign another history. Somebody who kept
a checkpoint still sees it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fortpoint.audit.checkpoint import Signer, VerifierKey
from fortpoint.errors import AuditUnavailable, VerificationError

PRIVATE_NAME = "audit.ed25519"
PUBLIC_NAME = "audit.pub"
_ORIGIN_PREFIX = "fortpoint/"
_LOG_ID_HEX_CHARS = 32
_MAX_FILE_BYTES = 16 * 1024


def load_or_create(home: Path, *, may_create: bool) -> Signer:
    """The log's signer. Raises ``AuditUnavailable``.

    ``may_create`` is true only for a log without entries: a second key under an existing log
    would leave its old checkpoints unverifiable.
    """
    folder = home / "keys"
    private = folder / PRIVATE_NAME
    try:
        if not private.exists():
            if not may_create:
                raise AuditUnavailable(
                    f"the record's signing key keys/{PRIVATE_NAME} is missing; restore it"
                )
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            create_private(private)
        signer = _signer(load_private(private))
        _publish(folder / PUBLIC_NAME, signer.verifier)
    except OSError as error:
        raise AuditUnavailable(f"the record's signing key: {error.strerror}") from None
    return signer


def load_public(home: Path) -> VerifierKey:
    """The verifier key of the log in ``home``. Raises ``VerificationError``."""
    try:
        with (home / "keys" / PUBLIC_NAME).open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode()
    except OSError as error:
        raise VerificationError(
            f"the log's public key keys/{PUBLIC_NAME} cannot be read: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise VerificationError(f"keys/{PUBLIC_NAME} is not a verifier key") from None
    return VerifierKey.parse(text)


def create_private(private: Path) -> None:
    """A new Ed25519 key in a file for its owner only. Raises ``OSError``."""
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    _write_once(private, pem, 0o600)


def load_private(private: Path) -> Ed25519PrivateKey:
    """Raises ``AuditUnavailable`` for a file that others may read, or that holds no such key."""
    name = f"{private.parent.name}/{private.name}"
    descriptor = os.open(private, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_mode & 0o077:
            raise AuditUnavailable(f"{name} may be read by other users; make it yours: chmod 600")
        pem = file.read(_MAX_FILE_BYTES)
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise AuditUnavailable(f"{name} is not an Ed25519 private key")
    return key


def _signer(key: Ed25519PrivateKey) -> Signer:
    log_id = hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()
    return Signer(_ORIGIN_PREFIX + log_id[:_LOG_ID_HEX_CHARS], key)


def _publish(public: Path, verifier: VerifierKey) -> None:
    if not public.exists():
        _write_once(public, f"{verifier}\n".encode(), 0o644)
    with public.open("rb") as file:
        if file.read(_MAX_FILE_BYTES) != f"{verifier}\n".encode():
            raise AuditUnavailable(
                f"keys/{PUBLIC_NAME} is not the public half of keys/{PRIVATE_NAME}"
            )


def _write_once(path: Path, data: bytes, mode: int) -> None:
    """Make ``path`` whole or not at all. Where another process was faster, its file stays."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        _sync_folder(path.parent)
    finally:
        draft.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
