"""Accounts, their events, links and known attacks in the database. No text, only hashes.

    await ledger.status("key:abc")                  # a few microseconds: every request asks
    await ledger.add({"key:abc": change}, links, attacks)
    await ledger.decide("key:abc", "active", by="grace", reason="appeal accepted", forget=True)

Several processes may write: what one adds is added to what is there, in one transaction, and a
change by an operator (``generation``) is never undone by a process that has not seen it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select, update

from fortpoint.errors import NotFound, StorageError
from fortpoint.guard.account import Account, AccountPolicy, Event, Standing
from fortpoint.guard.account_watch import Link
from fortpoint.guard.attack_families import Family
from fortpoint.guard.near_duplicates import KEY_BYTES
from fortpoint.store.database import Database
from fortpoint.store.tables import (
    account_events,
    account_links,
    accounts,
    guard_values,
    known_attacks,
)

MAX_REASON_CHARS = 512
KEPT_EVENTS = 1000  # of each account, the newest
KEPT_ATTACKS = 4096
KEPT_DAYS = 90

_SKETCH_KEY = "sketch_key"
_POLICY = "policy_sha256"

_NAMED = accounts.c.account == bindparam("account")
_ROW = select(accounts).where(_NAMED)
_STATUS = select(accounts.c.status, accounts.c.generation).where(_NAMED)
_decoder = msgspec.msgpack.Decoder(Account)
_encoder = msgspec.msgpack.Encoder()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """An account as it is on disk. ``risk`` is as of ``updated_at``."""

    account: str
    status: Standing
    generation: int
    reason: str
    changed_at: datetime
    changed_by: str
    updated_at: datetime
    state: Account


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One event as it is shown: hashes, identifiers, scores and times; no content."""

    number: int
    time: datetime
    kind: str
    weight: float
    request_id: str
    detector: str | None
    score: float | None
    family: str | None
    others: tuple[str, ...]


class Linked(msgspec.Struct, frozen=True, kw_only=True):
    """Another account that attacks with the same family of prompts."""

    other: str
    family: str
    times: int
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True)
class Change:
    """What one process adds to an account: events, and its volume where that changed."""

    account: Account
    events: Sequence[Event]
    generation: int
    status: Standing
    reason: str = ""


class AccountLedger:
    """All accounts of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def sketch_key(self) -> bytes:
        """The key of this home's sketches; made the first time."""
        return await self._database.write(_sketch_key)

    async def policy_in_force(self) -> str | None:
        """The SHA-256 of the policy that was last in force here."""
        value = await self._database.write(lambda connection: _value(connection, _POLICY))
        return None if value is None else value.decode()

    async def put_in_force(self, sha256: str) -> None:
        await self._database.write(lambda connection: _put_in_force(connection, sha256))

    async def status(self, account: str) -> tuple[Standing, int] | None:
        """Status and generation; every request asks. Raises ``StorageError``."""
        found = await self._database.first(_STATUS, account=account)
        return None if found is None else (found.status, found.generation)

    async def row(self, account: str) -> Row | None:
        """Raises ``StorageError``, also for a row that cannot be read."""
        found = await self._database.first(_ROW, account=account)
        return None if found is None else _row(found)

    async def add(
        self,
        changes: Mapping[str, Change],
        links: Sequence[Link],
        attacks: Mapping[str, Family],
        settings: AccountPolicy,
    ) -> dict[str, Account]:
        """Keep all of it or nothing; returns the accounts as they are on disk now.

        An account that an operator changed meanwhile (it has another generation) is left as it
        is, without what was added to its old state.
        """
        return await self._database.write(
            lambda connection: _add(connection, changes, links, attacks, settings)
        )

    async def decide(
        self, account: str, status: Standing, by: str, reason: str, *, forget: bool
    ) -> None:
        """An operator's decision. With ``forget`` the risk starts anew; the events stay."""
        await self._database.write(
            lambda connection: _decide(connection, account, status, by, reason, forget)
        )

    async def restore(self, account: str, before: Row | None) -> None:
        """Undo a decision that could not be recorded."""
        await self._database.write(lambda connection: _restore(connection, account, before))

    async def list(self, limit: int, offset: int = 0) -> tuple[Row, ...]:
        """Accounts that have a risk or a standing, the last changed first."""
        seen = select(account_events.c.account).distinct()
        query = (
            select(accounts)
            .where(or_(accounts.c.status != "active", accounts.c.account.in_(seen)))
            .order_by(accounts.c.changed_at.desc(), accounts.c.account)
            .limit(limit)
            .offset(offset)
        )
        async with self._database.connect() as connection:
            return tuple(_row(row) for row in (await connection.execute(query)).all())

    async def events(self, account: str, limit: int) -> tuple[Evidence, ...]:
        """The newest first."""
        query = (
            select(account_events)
            .where(account_events.c.account == account)
            .order_by(account_events.c.number.desc())
            .limit(limit)
        )
        async with self._database.connect() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return tuple(_evidence(row) for row in rows)

    async def links(self, account: str) -> tuple[Linked, ...]:
        links = account_links.c
        query = select(account_links).where(or_(links.account == account, links.other == account))
        async with self._database.connect() as connection:
            rows = (await connection.execute(query.order_by(links.last_at.desc()))).all()
        return tuple(
            Linked(
                other=row.other if row.account == account else row.account,
                family=row.family,
                times=row.times,
                first_at=row.first_at,
                last_at=row.last_at,
            )
            for row in rows
        )

    async def attacks(self) -> dict[str, Family]:
        """The newest known attacks, the oldest of them first."""
        query = select(known_attacks).order_by(known_attacks.c.last_at.desc()).limit(KEPT_ATTACKS)
        async with self._database.connect() as connection:
            rows = (await connection.execute(query)).all()
        return {row.family: _family(row) for row in reversed(rows)}

    async def require(self, account: str) -> Row:
        """Raises ``NotFound``."""
        row = await self.row(account)
        if row is None:
            raise NotFound("there is no such account; `fortpoint guard accounts list` names them")
        return row


def _sketch_key(connection: Connection) -> bytes:
    found = _value(connection, _SKETCH_KEY)
    if found is None:
        found = secrets.token_bytes(KEY_BYTES)
        connection.execute(insert(guard_values).values(name=_SKETCH_KEY, value=found))
    if len(found) != KEY_BYTES:
        raise StorageError("the key of the guard's sketches is damaged; restore the database")
    return found


def _put_in_force(connection: Connection, sha256: str) -> None:
    value = sha256.encode()
    named = guard_values.c.name == _POLICY
    if not connection.execute(update(guard_values).where(named).values(value=value)).rowcount:
        connection.execute(insert(guard_values).values(name=_POLICY, value=value))


def _value(connection: Connection, name: str) -> bytes | None:
    query = select(guard_values.c.value).where(guard_values.c.name == name)
    value: bytes | None = connection.execute(query).scalar_one_or_none()
    return value


def _add(
    connection: Connection,
    changes: Mapping[str, Change],
    links: Sequence[Link],
    attacks: Mapping[str, Family],
    settings: AccountPolicy,
) -> dict[str, Account]:
    kept = {}
    for account, change in changes.items():
        kept[account] = _merge(connection, account, change, settings)
        if change.events:
            rows = [_event_row(account, event) for event in change.events]
            connection.execute(insert(account_events), rows)
            _forget_old(connection, account)
    for link in links:
        _link(connection, link)
    for name, family in attacks.items():
        _keep_attack(connection, name, family)
    return kept


def _merge(
    connection: Connection, account: str, change: Change, settings: AccountPolicy
) -> Account:
    """What is on disk, with the change added."""
    found = connection.execute(_ROW, {"account": account}).first()
    now = datetime.now(UTC)
    if found is None:
        state = _with(Account(volume=change.account.volume), change.events, settings)
        connection.execute(
            insert(accounts).values(
                account=account,
                status=change.status,
                generation=change.generation,
                reason=change.reason,
                changed_at=now,
                changed_by="guard",
                updated_at=now,
                state=_encoder.encode(state),
            )
        )
        return state
    row = _row(found)
    if row.generation != change.generation:
        return row.state
    state = msgspec.structs.replace(row.state, volume=change.account.volume)
    state = _with(state, change.events, settings)
    values: dict[str, Any] = {"state": _encoder.encode(state), "updated_at": now}
    if change.status != row.status:
        values |= {
            "status": change.status,
            "reason": change.reason,
            "changed_at": now,
            "changed_by": "guard",
        }
    connection.execute(update(accounts).where(accounts.c.account == account).values(**values))
    return state


def _with(account: Account, events: Sequence[Event], settings: AccountPolicy) -> Account:
    for event in events:
        account = account.after(event, settings)
    return account


def _decide(
    connection: Connection, account: str, status: Standing, by: str, reason: str, forget: bool
) -> None:
    found = connection.execute(_ROW, {"account": account}).first()
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "status": status,
        "reason": reason,
        "changed_at": now,
        "changed_by": by,
        "updated_at": now,
    }
    if found is None:
        state = _encoder.encode(Account())
        connection.execute(
            insert(accounts).values(account=account, generation=1, state=state, **values)
        )
        return
    if forget:
        values["state"] = _encoder.encode(Account())
    values["generation"] = found.generation + 1
    connection.execute(update(accounts).where(accounts.c.account == account).values(**values))


def _restore(connection: Connection, account: str, before: Row | None) -> None:
    where = accounts.c.account == account
    if before is None:
        connection.execute(delete(accounts).where(where))
        return
    values = msgspec.structs.asdict(before) | {
        "state": _encoder.encode(before.state),
        "generation": before.generation + 2,  # whoever saw the decision must see this too
    }
    connection.execute(update(accounts).where(where).values(**values))


def _forget_old(connection: Connection, account: str) -> None:
    """Evidence is bounded in number and age."""
    own = account_events.c.account == account
    newest = (
        select(account_events.c.number)
        .where(own)
        .order_by(account_events.c.number.desc())
        .limit(1)
        .offset(KEPT_EVENTS)
    )
    last = connection.execute(newest).scalar_one_or_none()
    too_old = account_events.c.time < datetime.now(UTC) - timedelta(days=KEPT_DAYS)
    gone = or_(too_old, account_events.c.number <= (last or 0))
    connection.execute(delete(account_events).where(own, gone))


def _link(connection: Connection, link: Link) -> None:
    now = datetime.now(UTC)
    where = (account_links.c.account == link.account, account_links.c.other == link.other)
    times = account_links.c.times + 1
    known = connection.execute(
        update(account_links).where(*where).values(family=link.family, last_at=now, times=times)
    )
    if not known.rowcount:
        connection.execute(
            insert(account_links).values(
                account=link.account,
                other=link.other,
                family=link.family,
                times=1,
                first_at=now,
                last_at=now,
            )
        )


def _keep_attack(connection: Connection, name: str, family: Family) -> None:
    values = {
        "n": family.n,
        "suspicion": family.suspicion,
        "blocked": family.blocked,
        "last_at": datetime.now(UTC),
    }
    known = connection.execute(
        update(known_attacks).where(known_attacks.c.family == name).values(**values)
    )
    if not known.rowcount:
        sketch = msgspec.msgpack.encode(family.sketch)
        connection.execute(insert(known_attacks).values(family=name, sketch=sketch, **values))
        _forget_old_attacks(connection)


def _forget_old_attacks(connection: Connection) -> None:
    n_known = connection.execute(select(func.count()).select_from(known_attacks)).scalar_one()
    if n_known <= KEPT_ATTACKS:
        return
    oldest = (
        select(known_attacks.c.family)
        .order_by(known_attacks.c.last_at)
        .limit(n_known - KEPT_ATTACKS)
    )
    names = list(connection.execute(oldest).scalars())
    connection.execute(delete(known_attacks).where(known_attacks.c.family.in_(names)))


def _row(found: Any) -> Row:
    try:
        state = _decoder.decode(found.state)
    except (msgspec.MsgspecError, TypeError):
        raise StorageError("an account's state cannot be read; restore the database") from None
    return Row(
        account=found.account,
        status=found.status,
        generation=found.generation,
        reason=found.reason,
        changed_at=found.changed_at,
        changed_by=found.changed_by,
        updated_at=found.updated_at,
        state=state,
    )


def _event_row(account: str, event: Event) -> dict[str, Any]:
    row = msgspec.structs.asdict(event)
    row["time"] = datetime.fromtimestamp(event.time, UTC)
    row["others"] = " ".join(event.others)
    return {"account": account, **row}


def _evidence(row: Any) -> Evidence:
    values = {str(name): value for name, value in row.items() if name != "account"}
    return Evidence(**values | {"others": tuple(values["others"].split())})


def _family(row: Any) -> Family:
    sketch = msgspec.msgpack.decode(row.sketch, type=tuple[int, ...])
    return Family(sketch, n=row.n, suspicion=row.suspicion, blocked=row.blocked)
