"""What the record keeps of one request or one administrative act.

The bytes of an entry are canonical JSON (keys sorted, no spaces, UTF-8):

    {"entry":{...},"index":17,"nonce":"9f...","version":1}

``index`` is inside, so that an entry that was moved is named. ``nonce`` is 16 random bytes:
without it, the leaf hash of a short entry could be guessed by trying contents, and hashes
are what one hands to others as proof.

An entry says what the gateway saw. It does not prove that the gateway told the truth.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Literal

import msgspec

from fortpoint.errors import AuditUnavailable
from fortpoint.types import Usage, Verdict

VERSION = 1
NONCE_BYTES = 16
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


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the record.

    ``time`` is RFC 3339 in UTC with microseconds (``now()``). ``surface`` is the path or
    command used. ``code`` is the error's, where one was answered. ``request_sha256`` and
    ``response_sha256`` are hexadecimal hashes of the bodies; ``request`` and ``response`` are
    the contents themselves, only where ``audit.record_content`` is on. ``inside`` is absent
    where the request asked for nothing there and no alert was raised.
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
    request: str | None = None
    response: str | None = None
    detail: str | None = None
    inside: Inside | msgspec.UnsetType = msgspec.UNSET


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
    if sealed.version != VERSION:
        raise ValueError("an entry of a newer version")
    return sealed
