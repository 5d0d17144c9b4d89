"""Who holds which copy: a lease for one model, one host and a time, and its mark's key.

    leases = FileLeases(home)
    lease = issue(leases, commitments, master, terms)
    check(lease, digest, host, now)          # LeaseRefused says why not
    with leases.hold(lease.id): ...          # one engine at a time

The mark's key is HKDF(master, digest and lease); its hash is committed, to the audit log, before
the lease exists, so that nobody can make up a key that fits a suspect afterwards. The file holds
no secret.

Not protected here: the file. Who can write it can add leases, but not commitments; ``trace``
counts only leases whose key has the committed hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fortpoint.errors import LeaseRefused, StorageError
from fortpoint.vault import atomic_file
from fortpoint.vault.fingerprint import EPSILON

MAX_LEASES = 1_000_000
_MAX_FILE_BYTES = 1 << 30
_ID = re.compile(r"lease_[0-9a-f]{24}")
_KEY_INFO, _COMMIT_INFO = b"fortpoint mark key v1\0", b"fortpoint mark commitment v1\0"


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For whom a copy is, where and how long; times are Unix seconds. ``digest``: the model's."""

    model: str
    digest: str
    holder: str
    host: str
    issued_at: int
    expires_at: int


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``commitment`` is the hexadecimal hash of the mark's key, bound to model and lease."""

    id: str
    terms: Terms
    commitment: str
    epsilon: float = EPSILON
    revoked_at: int | None = None
    releases: int = 0


class Commitments(Protocol):
    """Where a lease is recorded before it exists; the audit log, from ``cli``."""

    def commit(self, lease: Lease) -> None:
        """Raises ``AuditUnavailable`` where it cannot be recorded; then there is no lease."""
        ...


class LeaseStore(Protocol):
    """Leases by id; a database can stand in for the file."""

    def add(self, lease: Lease) -> None: ...

    def get(self, lease_id: str) -> Lease: ...

    def all(self) -> tuple[Lease, ...]: ...

    def update(self, lease: Lease) -> None: ...


def issue(store: LeaseStore, commitments: Commitments, master: bytes, terms: Terms) -> Lease:
    """Commit to a new lease's key, then keep the lease."""
    lease_id = f"lease_{secrets.token_hex(12)}"
    lease = Lease(lease_id, terms, commitment(mark_key(master, terms.digest, lease_id), lease_id))
    commitments.commit(lease)
    store.add(lease)
    return lease


def mark_key(master: bytes, digest: str, lease_id: str) -> bytes:
    """32 bytes: the secret of one lease's mark."""
    info = _KEY_INFO + digest.encode() + b"\0" + lease_id.encode()
    return HKDF(SHA256(), 32, None, info).derive(master)


def commitment(key: bytes, lease_id: str) -> str:
    return hashlib.sha256(_COMMIT_INFO + lease_id.encode() + b"\0" + key).hexdigest()


def is_committed(lease: Lease, key: bytes) -> bool:
    """Whether this is the key that was committed to."""
    return hmac.compare_digest(commitment(key, lease.id), lease.commitment)


def check(lease: Lease, digest: str, host: str, now: int) -> None:
    """Raises ``LeaseRefused`` with the reason."""
    terms = lease.terms
    if lease.revoked_at is not None:
        raise LeaseRefused(f"{lease.id} was revoked; ask for a new lease")
    if not hmac.compare_digest(terms.digest, digest):
        raise LeaseRefused(f"{lease.id} is for another model than this one")
    if terms.host != host:
        raise LeaseRefused(f"{lease.id} is for the host {terms.host[:64]!r}, not this one")
    if not terms.issued_at <= now < terms.expires_at:
        raise LeaseRefused(f"{lease.id} is not valid at this time; ask for a new lease")


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    leases: tuple[Lease, ...] = ()
    version: int = 1


class FileLeases:
    """``vault/leases.json`` of a home, changed by one process at a time and in one step."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "vault"
        self._path = self._folder / "leases.json"

    def add(self, lease: Lease) -> None:
        with self._locked():
            held = self.all()
            if len(held) >= MAX_LEASES or any(other.id == lease.id for other in held):
                raise StorageError(f"no room for {lease.id}: it is there, or there are too many")
            self._write((*held, lease))

    def get(self, lease_id: str) -> Lease:
        for lease in self.all():
            if lease.id == lease_id:
                return lease
        raise LeaseRefused(f"there is no lease {lease_id[:40]!r}; `fortpoint vault lease list`")

    def all(self) -> tuple[Lease, ...]:
        try:
            if self._path.stat().st_size > _MAX_FILE_BYTES:
                raise StorageError(f"leases.json is larger than {_MAX_FILE_BYTES} bytes")
            return msgspec.json.decode(self._path.read_bytes(), type=_Document).leases
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise StorageError(f"leases.json cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise StorageError("leases.json is damaged; restore it from a backup") from None

    def update(self, lease: Lease) -> None:
        self.get(lease.id)
        with self._locked():
            self._write(tuple(lease if held.id == lease.id else held for held in self.all()))

    @contextmanager
    def hold(self, lease_id: str) -> Iterator[None]:
        """Keep others from using the lease meanwhile. Raises ``LeaseRefused``."""
        if not _ID.fullmatch(lease_id):
            raise LeaseRefused(f"{lease_id[:40]!r} is no lease")
        with self._lock(f"{lease_id}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield

    def _write(self, leases: tuple[Lease, ...]) -> None:
        atomic_file.replace(self._path, msgspec.json.encode(_Document(leases)))

    def _locked(self) -> AbstractContextManager[None]:
        return self._lock("leases.lock", fcntl.LOCK_EX)

    @contextmanager
    def _lock(self, name: str, how: int) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._folder / name, flags, 0o600)
        except OSError as error:
            raise StorageError(f"{name} cannot be made: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, how)
            except BlockingIOError:
                raise LeaseRefused("another process uses this lease; stop it first") from None
            yield
        finally:
            os.close(descriptor)
