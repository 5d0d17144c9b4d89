"""Alerts and statistics of what is watched, in the database.

    await ledger.write(alerts, counts)              # one transaction
    page = await ledger.alerts(limit=100)           # newest first
    rows = await ledger.statistics(limit=100)

No text is kept: an alert says in which request, of which key, which target was how active, and
whose token it was. Every gateway process adds its counts to the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Float, bindparam, case, func, insert, select, update

from fortpoint.store.database import Database
from fortpoint.store.tables import alerts, feature_stats
from fortpoint.types import Role

Part = Literal["prompt", "answer"]


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """A watched target was more active than its threshold, in units of its training maximum.

    ``value`` is its strongest reading in this ``part`` of the request, ``role`` who wrote the
    token where that was. ``steered`` says that the request was. ``number`` counts up.
    """

    number: int | None = None
    time: datetime
    request_id: str
    key_id: str
    target: str
    value: float
    threshold: float
    role: Role
    part: Part
    steered: bool
    action: Literal["alert"] = "alert"


class FeatureCount(msgspec.Struct, frozen=True, kw_only=True):
    """What one key's requests made of one target, over all tokens that were read."""

    key_id: str
    target: str
    tokens: int
    tokens_over: int
    maximum: float
    last_over_at: datetime | None

    def plus(self, other: FeatureCount) -> FeatureCount:
        """Both together; ``other`` is the later."""
        return FeatureCount(
            key_id=self.key_id,
            target=self.target,
            tokens=self.tokens + other.tokens,
            tokens_over=self.tokens_over + other.tokens_over,
            maximum=max(self.maximum, other.maximum),
            last_over_at=other.last_over_at or self.last_over_at,
        )


_t = feature_stats.c
_peak = bindparam("peak", type_=Float())
_over_at = bindparam("over_at", type_=_t.last_over_at.type)
_ADD = (
    update(feature_stats)
    .where(_t.key_id == bindparam("of_key"), _t.target == bindparam("of_target"))
    .values(
        tokens=_t.tokens + bindparam("n"),
        tokens_over=_t.tokens_over + bindparam("n_over"),
        maximum=case((_t.maximum < _peak, _peak), else_=_t.maximum),
        last_over_at=func.coalesce(_over_at, _t.last_over_at),
    )
)
_PAGE = select(alerts).order_by(alerts.c.number.desc())
_STATISTICS = select(feature_stats).order_by(_t.key_id, _t.target)


class WatchLedger:
    """All alerts and statistics of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, found: Sequence[Alert], counts: Sequence[FeatureCount]) -> None:
        """Add both, or neither. Raises ``StorageError``."""
        await self._database.write(lambda connection: _write(connection, found, counts))

    async def alerts(self, limit: int, before: int | None = None) -> tuple[Alert, ...]:
        """The newest first; ``before`` goes on from an alert's number."""
        query = _PAGE.limit(limit)
        if before is not None:
            query = query.where(alerts.c.number < before)
        return tuple(msgspec.convert(row, Alert) for row in await self._rows(query))

    async def statistics(
        self, limit: int, offset: int = 0, key_id: str | None = None
    ) -> tuple[FeatureCount, ...]:
        """By key and target."""
        query = _STATISTICS.limit(limit).offset(offset)
        if key_id is not None:
            query = query.where(_t.key_id == key_id)
        return tuple(FeatureCount(**row) for row in await self._rows(query))

    async def _rows(self, query: Any) -> list[dict[str, Any]]:
        async with self._database.connect() as connection:
            found = (await connection.execute(query)).mappings()
            # A column's name is more than a string, which msgspec does not take for one.
            return [{str(name): value for name, value in row.items()} for row in found]


def _write(connection: Connection, found: Sequence[Alert], counts: Sequence[FeatureCount]) -> None:
    """In a thread, inside the transaction."""
    if found:
        connection.execute(insert(alerts), [_alert_row(alert) for alert in found])
    for count in counts:
        added = connection.execute(
            _ADD,
            {
                "of_key": count.key_id,
                "of_target": count.target,
                "n": count.tokens,
                "n_over": count.tokens_over,
                "peak": count.maximum,
                "over_at": count.last_over_at,
            },
        )
        if not added.rowcount:
            connection.execute(insert(feature_stats).values(**msgspec.structs.asdict(count)))


def _alert_row(alert: Alert) -> dict[str, Any]:
    row = msgspec.structs.asdict(alert)
    del row["number"]
    return {**row, "role": alert.role.value}
