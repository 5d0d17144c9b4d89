"""Saved steering, and whose keys have it.

    await book.save(Preset("golden-gate-6", "smollm2-135m", steers, now, "ada"))
    await book.assign("golden-gate-6", key_id, always=True)
    await book.default_of(key_id)           # applied to each request of this key
    await book.granted(key_id, "calm")      # asked for by name; None where this key may not

``steers`` is JSON whose form the gateway knows and checks; here it is bytes with a digest, so
that the record can say which version of a preset a request had. A preset that is a key's
default cannot be removed: that key's requests would go on without it.

Each request reads its key's default, so a change holds from the next request on, in every
process. Not protected here: whoever may write the database may change a preset; the digest in
the record shows it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, bindparam, delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from fortpoint.errors import AuditUnavailable, InvalidRequest, NotFound, StorageError
from fortpoint.store.database import Database
from fortpoint.store.tables import keys, preset_defaults, preset_keys, presets

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
KEY_ID_PATTERN = "^[a-z2-7]{12}$"

_NAME = re.compile(NAME_PATTERN.strip("^$"))
_KEY_ID = re.compile(KEY_ID_PATTERN.strip("^$"))
_SHOWN_KEYS = 5

_DEFAULT = (
    select(presets)
    .join(preset_defaults, preset_defaults.c.preset == presets.c.name)
    .where(preset_defaults.c.key_id == bindparam("key_id"))
)
_GRANTED = (
    select(presets)
    .join(preset_keys, preset_keys.c.preset == presets.c.name)
    .where(preset_keys.c.key_id == bindparam("key_id"), presets.c.name == bindparam("name"))
)
_NAMED = select(presets).where(presets.c.name == bindparam("name"))


class Preset(msgspec.Struct, frozen=True):
    """A named list of steers for one model. ``saved_by`` is a user, or an account as ``os:...``."""

    name: str
    model: str
    steers: bytes
    saved_at: datetime
    saved_by: str

    @property
    def sha256(self) -> str:
        """Of the model's name, a line feed and the steers: which version this is."""
        return hashlib.sha256(self.model.encode() + b"\n" + self.steers).hexdigest()


class Assigned(msgspec.Struct, frozen=True):
    """A preset, the keys that may ask for it, and those whose every request has it."""

    preset: Preset
    keys: tuple[str, ...] = ()
    default_of: tuple[str, ...] = ()


class PresetBook:
    """All presets of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def default_of(self, key_id: str) -> Preset | None:
        """What is applied to each request of this key."""
        return _preset(await self._database.first(_DEFAULT, key_id=key_id))

    async def granted(self, key_id: str, name: str) -> Preset | None:
        """A preset that this key may ask for."""
        return _preset(await self._database.first(_GRANTED, key_id=key_id, name=name))

    async def named(self, name: str) -> Preset | None:
        """Any preset, for whoever may use them all."""
        return _preset(await self._database.first(_NAMED, name=name))

    async def names_of(self, key_id: str) -> tuple[str, ...]:
        """The presets that this key may ask for."""
        query = select(preset_keys.c.preset).where(preset_keys.c.key_id == key_id)
        async with self._database.connect() as connection:
            return tuple(sorted((await connection.execute(query)).scalars()))

    async def list(self) -> tuple[Assigned, ...]:
        """Every preset by name, with its keys."""
        async with self._database.connect() as connection:
            found = (await connection.execute(select(presets).order_by(presets.c.name))).all()
            return tuple([await _assigned(connection, Preset(*row)) for row in found])

    async def save(
        self,
        preset: Preset,
        keys_of: Sequence[str] | None = None,
        default_of: Sequence[str] | None = None,
    ) -> None:
        """Save it, in the place of one of its name. Lists of keys, where given, replace theirs.

        Raises ``InvalidRequest``, and ``NotFound`` for a key that there is not.
        """
        check_name(preset.name)
        async with self._database.begin() as connection:
            await _put(connection, preset)
            if keys_of is not None:
                await connection.execute(_of(preset_keys, preset.name))
                for key_id in dict.fromkeys(keys_of):
                    await _grant(connection, preset.name, key_id)
            if default_of is not None:
                await connection.execute(_of(preset_defaults, preset.name))
                for key_id in dict.fromkeys(default_of):
                    await _make_default(connection, preset.name, key_id)

    async def assign(self, name: str, key_id: str, *, always: bool) -> str | None:
        """Let the key ask for it; with ``always`` make it the key's default, the only one.

        Returns the default that it took the place of. Raises ``NotFound``.
        """
        async with self._database.begin() as connection:
            await _require(connection, name)
            await _grant(connection, name, key_id)
            return await _make_default(connection, name, key_id) if always else None

    async def unassign(self, name: str, key_id: str) -> None:
        """Take it from the key, as a default too. Raises ``NotFound``."""
        async with self._database.begin() as connection:
            await _require(connection, name)
            n_gone = 0
            for table in (preset_keys, preset_defaults):
                gone = await connection.execute(_of(table, name).where(table.c.key_id == key_id))
                n_gone += gone.rowcount
            if not n_gone:
                raise NotFound("this key does not have that preset")

    async def remove(self, name: str) -> None:
        """Forget it. Raises ``NotFound``, and ``InvalidRequest`` while it is a key's default."""
        async with self._database.begin() as connection:
            await _require(connection, name)
            now = datetime.now(UTC)
            lives = or_(keys.c.expires_at.is_(None), keys.c.expires_at > now)
            query = (
                select(preset_defaults.c.key_id)
                .join(keys, keys.c.key_id == preset_defaults.c.key_id)
                .where(preset_defaults.c.preset == name, keys.c.revoked_at.is_(None), lives)
            )
            held = sorted((await connection.execute(query)).scalars())
            if held:
                raise InvalidRequest(
                    f"it is applied to every request of {len(held)} keys: "
                    f"{', '.join(held[:_SHOWN_KEYS])}; take it from them first"
                )
            await connection.run_sync(_forget, name)

    @asynccontextmanager
    async def kept_if_recorded(self, name: str) -> AsyncIterator[None]:
        """What the block changes of this preset is undone when it cannot be recorded."""
        before = await self._find(name)
        try:
            yield
        except AuditUnavailable:
            with suppress(StorageError):
                await self._restore(name, before)
            raise

    async def _find(self, name: str) -> Assigned | None:
        async with self._database.connect() as connection:
            row = (await connection.execute(_NAMED, {"name": name})).first()
            return None if row is None else await _assigned(connection, Preset(*row))

    async def _restore(self, name: str, before: Assigned | None) -> None:
        if before is not None:
            await self.save(before.preset, before.keys, before.default_of)
            return
        async with self._database.begin() as connection:
            await connection.run_sync(_forget, name)


def is_name(name: str) -> bool:
    """Whether a preset can be called so."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raises ``InvalidRequest``."""
    if not is_name(name):
        raise InvalidRequest(
            "a preset's name is 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first",
            param="name",
        )


def _preset(row: Any | None) -> Preset | None:
    if row is None:
        return None
    return Preset(row.name, row.model, row.steers, row.saved_at, row.saved_by)


async def _assigned(connection: AsyncConnection, preset: Preset) -> Assigned:
    async def key_ids(table: Any) -> tuple[str, ...]:
        query = select(table.c.key_id).where(table.c.preset == preset.name)
        return tuple(sorted((await connection.execute(query)).scalars()))

    return Assigned(preset, await key_ids(preset_keys), await key_ids(preset_defaults))


async def _put(connection: AsyncConnection, preset: Preset) -> None:
    values = msgspec.structs.asdict(preset)
    if await _exists(connection, preset.name):
        where = presets.c.name == preset.name
        await connection.execute(presets.update().where(where).values(**values))
    else:
        await connection.execute(insert(presets).values(**values))


async def _exists(connection: AsyncConnection, name: str) -> bool:
    return (await connection.execute(_NAMED, {"name": name})).first() is not None


async def _require(connection: AsyncConnection, name: str) -> None:
    if not await _exists(connection, name):
        raise NotFound("there is no preset of this name")


async def _grant(connection: AsyncConnection, name: str, key_id: str) -> None:
    await _require_key(connection, key_id)
    await connection.execute(_of(preset_keys, name).where(preset_keys.c.key_id == key_id))
    await connection.execute(insert(preset_keys).values(key_id=key_id, preset=name))


async def _make_default(connection: AsyncConnection, name: str, key_id: str) -> str | None:
    """Returns the other preset that was the key's default."""
    await _require_key(connection, key_id)
    own = preset_defaults.c.key_id == key_id
    query = select(preset_defaults.c.preset).where(own)
    before: str | None = (await connection.execute(query)).scalar_one_or_none()
    await connection.execute(delete(preset_defaults).where(own))
    await connection.execute(insert(preset_defaults).values(key_id=key_id, preset=name))
    return None if before == name else before


async def _require_key(connection: AsyncConnection, key_id: str) -> None:
    found = None
    if _KEY_ID.fullmatch(key_id):
        query = select(keys.c.key_id).where(keys.c.key_id == key_id)
        found = (await connection.execute(query)).first()
    if found is None:
        raise NotFound("there is no key with this id")


def _of(table: Any, name: str) -> Any:
    """Delete a preset's rows of ``table``."""
    where: ColumnElement[bool] = table.c.preset == name
    return delete(table).where(where)


def _forget(connection: Connection, name: str) -> None:
    for table in (preset_keys, preset_defaults):
        connection.execute(_of(table, name))
    connection.execute(delete(presets).where(presets.c.name == name))
