"""What the record keeps of one request or one administrative act.

The bytes of an entry are canonical JSON (keys sorted, no spaces, UTF-8):

    {"entry":{...},"index":17,"nonce":"9f...","version":2}

``index`` is inside, so that an entry that was moved is named. ``nonce`` is 16 random bytes:
without it, the leaf hash of a short entry could be guessed by trying contents, and hashes
are what one hands to others as proof.

No entry holds what was asked or answered, only ``commitment``s to it. The salt, and the text
where it is kept, lie beside the entry as its ``Content``, which can be erased: the entry and
every proof stay as they are, and its hashes then say nothing about anything.

An entry says what the gateway saw. It does not prove that the gateway told the truth.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from datetime import UTC, datetime
from typing import Literal

import msgspec

from fortpoint.errors import AuditUnavailable
from fortpoint.types import Usage, Verdict

VERSION = 2
NONCE_BYTES = 16
SALT_BYTES = 32
MAX_ENTRY_BYTES = 16 * 1024 * 1024

Kind = Literal["answer", "refusal", "failure", "admin"]


class PresetUse(msgspec.Struct, frozen=True):
    """A preset that was applied, and the digest of what it was then."""

    name: str
    sha256: str


class Inside(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request changed and read inside the model.

    ``steers`` and ``stop_when`` count the request's own; ``watch`` names the dictionaries whose
    features were sent along, ``alerts`` the watched targets that were over their thresholds.
    """

    presets: tuple[PresetUse, ...] = ()
    steers: int = 0
    stop_when: int = 0
    watch: tuple[str, ...] = ()
    adapter: str | None = None
    alerts: tuple[str, ...] = ()


class Stage(msgspec.Struct, frozen=True):
    """One step of a judgement: how long it took, and ``ok`` or ``failed``."""

    name: str
    milliseconds: float
    outcome: str


class PolicyUse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The guard's policy in force, the rules that decided, and what shadow rules would have."""

    version: str
    sha256: str
    rules: tuple[str, ...] = ()
    shadow: str | None = None
    shadow_rules: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the record.

    ``time`` is RFC 3339 in UTC with microseconds (``now()``). ``surface`` is the path or
    command used. ``code`` is the error's, where one was answered. ``request_sha256`` and
    ``response_sha256`` are commitments to the bodies under the salt of the entry's ``Content``
    (in version 1, which had none, plain hashes). ``inside`` is absent where the request asked
    for nothing there and no alert was raised, ``policy`` where there is no guard.
    """

    time: str
    kind: Kind
    request_id: str
    surface: str
    status: int
    key_id: str | None = None
    user: str | None = None
    role: str | None = None
    model: str | None = None
    model_digest: str | None = None
    code: str | None = None
    finish_reasons: tuple[str, ...] = ()
    verdict: Verdict | None = None
    usage: Usage = Usage()
    request_sha256: str | None = None
    response_sha256: str | None = None
    detail: str | None = None
    inside: Inside | msgspec.UnsetType = msgspec.UNSET
    policy: PolicyUse | msgspec.UnsetType = msgspec.UNSET


class Content(msgspec.Struct, frozen=True):
    """What is kept beside an entry and can be erased.

    ``request`` and ``response`` are there only where ``audit.record_content`` is on.
    """

    salt: bytes
    request: bytes | None = None
    response: bytes | None = None


class Sealed(msgspec.Struct, frozen=True):
    """An entry as the log holds it."""

    entry: Entry
    index: int
    nonce: str
    version: int


_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(Sealed)


def now() -> str:
    """This moment, as ``Entry.time`` wants it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def new_request_id(prefix: str) -> str:
    """``prefix``, the milliseconds since 1970 and 48 random bits, both hexadecimal.

    Ids that were made one after the other lie beside each other in the database's index.
    """
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


def new_salt() -> bytes:
    return secrets.token_bytes(SALT_BYTES)


def commitment(salt: bytes, data: bytes) -> str:
    """SHA-256(salt || data), hexadecimal: shows nothing of ``data`` without the salt."""
    return hashlib.sha256(salt + data).hexdigest()


def encode(entry: Entry) -> bytes:
    """The entry's own bytes. Raises ``AuditUnavailable`` for one that cannot be recorded."""
    try:
        body = _encoder.encode(entry)
    except (UnicodeEncodeError, TypeError, OverflowError, msgspec.MsgspecError):
        raise AuditUnavailable("the record cannot hold this entry: it is not valid text") from None
    if len(body) > MAX_ENTRY_BYTES - 256:
        raise AuditUnavailable("the record cannot hold this entry: it is too large")
    return body


def seal(body: bytes, index: int) -> bytes:
    """The bytes that are hashed and stored: ``body`` (from ``encode``) at its place."""
    # Joined, not encoded again: the place is known only inside the transaction, where every
    # microsecond is another caller's wait.
    nonce = secrets.token_hex(NONCE_BYTES).encode()
    return b'{"entry":%b,"index":%d,"nonce":"%b","version":%d}' % (body, index, nonce, VERSION)


def unseal(data: bytes) -> Sealed:
    """The inverse of ``encode`` and ``seal``. Raises ``ValueError``."""
    try:
        sealed = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError("not an entry") from None
    if not 1 <= sealed.version <= VERSION:
        raise ValueError("an entry of a newer version")
    return sealed
