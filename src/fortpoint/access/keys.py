"""Bearer keys: who is asking, and as what.

    new = await keyring.create("ada", "customer")
    new.secret                                     # shown once, kept nowhere
    principal = await keyring.authenticate(new.secret)

A token is ``sk-fp-<key id>-<secret>``: the id names the row, the secret is 32 random bytes in
URL-safe base64. Only the secret's SHA-256 is stored. A slow password hash would add nothing:
it exists to make guessing a human's choice expensive, and 256 random bits cannot be guessed
at any speed; it would let anyone with a wrong key burn our processors.

Every authentication reads the row, so a revoked key is refused by the next request, in every
process. Not protected here: whoever may write the database may add a key. The audit log
records the keys that were made with the product's own commands.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn

import msgspec
from sqlalchemy import bindparam, func, insert, select, update

from fortpoint.errors import InvalidRequest, NotFound, Unauthenticated
from fortpoint.store.database import Database
from fortpoint.store.tables import keys

RoleName = Literal["customer", "operator"]
ROLES: tuple[RoleName, ...] = ("customer", "operator")
MAX_USER_CHARS = 128

_PREFIX = "sk-fp-"
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_ID_CHARS = 12
_SECRET_BYTES = 32
_KEY_ID = re.compile(r"[a-z2-7]{12}")
_TOKEN = re.compile(r"sk-fp-([a-z2-7]{12})-([A-Za-z0-9_-]{43})")
_TOKEN_CHARS = len(_PREFIX) + _ID_CHARS + 1 + 43

_BY_ID = select(keys).where(keys.c.key_id == bindparam("key_id"))

# Compared where no row has the id, so that an unknown id and a wrong secret take one path.
_NO_KEY = bytes(32)


class Principal(msgspec.Struct, frozen=True):
    """Who asks, once a key was accepted."""

    key_id: str
    user: str
    role: RoleName


class NewKey(msgspec.Struct, frozen=True):
    """A key at the only moment when its ``secret`` (the whole bearer token) is known.

    In JSON the secret is called ``key``, for that is what a caller presents.
    """

    key_id: str
    secret: str = msgspec.field(name="key")
    user: str
    role: RoleName
    expires_at: datetime | None

    def __repr__(self) -> str:
        return f"NewKey(key_id={self.key_id!r}, user={self.user!r}, role={self.role!r})"


class KeyRecord(msgspec.Struct, frozen=True):
    """What may be listed of a key: neither its secret nor the secret's hash."""

    key_id: str
    user: str
    role: RoleName
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class KeyRing:
    """All keys of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, user: str, role: RoleName, expires_at: datetime | None = None) -> NewKey:
        """Make a key. Raises ``InvalidRequest`` and ``StorageError``."""
        _check_user(user)
        _check_role(role)
        now = datetime.now(UTC)
        _check_expiry(expires_at, now)
        key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARS))
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        async with self._database.begin() as connection:
            await connection.execute(
                insert(keys).values(
                    key_id=key_id,
                    secret_sha256=_digest(secret),
                    user=user,
                    role=role,
                    created_at=now,
                    expires_at=expires_at,
                )
            )
        return NewKey(key_id, f"{_PREFIX}{key_id}-{secret}", user, role, expires_at)

    async def revoke(self, key_id: str) -> None:
        """Refuse the key from now on. A second time changes nothing. Raises ``NotFound``."""
        if not _KEY_ID.fullmatch(key_id):
            raise NotFound("there is no key with this id")
        async with self._database.begin() as connection:
            revoked = await connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id)
                # The first revocation is the one that counts.
                .values(revoked_at=func.coalesce(keys.c.revoked_at, datetime.now(UTC)))
            )
        if revoked.rowcount == 0:
            raise NotFound("there is no key with this id")

    async def list(self) -> tuple[KeyRecord, ...]:
        """Every key, oldest first, revoked and expired ones too."""
        columns = (keys.c[name] for name in KeyRecord.__struct_fields__)
        query = select(*columns).order_by(keys.c.created_at, keys.c.key_id)
        async with self._database.connect() as connection:
            rows = (await connection.execute(query)).all()
        return tuple(KeyRecord(*row) for row in rows)

    async def is_empty(self) -> bool:
        """Whether no key was ever made."""
        async with self._database.connect() as connection:
            found = await connection.execute(select(keys.c.key_id).limit(1))
            return found.first() is None

    async def authenticate(self, token: str) -> Principal:
        """The principal of a bearer token.

        Raises ``Unauthenticated``, with one message whether the token is malformed, unknown,
        wrong, revoked or expired: which of them it is helps only a guesser.
        """
        # 1. The shape. The length first, so that a long header costs nothing.
        match = _TOKEN.fullmatch(token) if len(token) == _TOKEN_CHARS else None
        if match is None:
            _refuse()
        key_id, secret = match.groups()
        # 2. The secret, in constant time, also where there is no such key.
        row = await self._row(key_id)
        stored = _NO_KEY if row is None else row.secret_sha256
        if not hmac.compare_digest(stored, _digest(secret)) or row is None:
            _refuse()
        # 3. Whether it still holds.
        if row.revoked_at is not None:
            _refuse()
        if row.expires_at is not None and row.expires_at <= datetime.now(UTC):
            _refuse()
        return Principal(row.key_id, row.user, row.role)

    async def _row(self, key_id: str) -> Any | None:
        return await self._database.first(_BY_ID, key_id=key_id)


def _refuse() -> NoReturn:
    raise Unauthenticated("the API key is missing, wrong, expired or revoked")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


def _check_user(user: str) -> None:
    # isprintable() is false for control and format characters (among them the ones that turn
    # the reading direction round) and for lone surrogates, which UTF-8 cannot hold.
    if not 1 <= len(user) <= MAX_USER_CHARS or not user.isprintable() or user != user.strip():
        raise InvalidRequest(
            f"a user name is 1 to {MAX_USER_CHARS} printable characters, "
            "without a space at either end",
            param="user",
        )


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise InvalidRequest(f"a role is one of {', '.join(ROLES)}", param="role")


def _check_expiry(expires_at: datetime | None, now: datetime) -> None:
    if expires_at is None:
        return
    if expires_at.tzinfo is None:
        raise InvalidRequest("an expiry needs a time zone", param="expires_at")
    if expires_at <= now:
        raise InvalidRequest("an expiry lies in the future", param="expires_at")
