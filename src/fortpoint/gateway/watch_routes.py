"""What operators read of the watch: alerts, newest first, and statistics for each key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, get
from litestar.types import ASGIApp
from msgspec import Meta

from fortpoint.access.presets import KEY_ID_PATTERN
from fortpoint.gateway import paging, record, steps, wire
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.watch_ledger import Alert, FeatureCount

MAX_ROWS = 1000
MAX_NUMBER = 2**53
_ROWS = 100


class AlertsQuery(msgspec.Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="Alerts at most.")] = _ROWS
    before: Annotated[
        int, Meta(ge=1, le=MAX_NUMBER, description="Go on from this alert's number.")
    ] = MAX_NUMBER


class StatisticsQuery(msgspec.Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="Rows at most.")] = _ROWS
    offset: Annotated[int, Meta(ge=0, le=MAX_NUMBER, description="Rows to leave out.")] = 0
    key_id: (
        Annotated[str, Meta(pattern=KEY_ID_PATTERN, description="Of this key only.")]
        | msgspec.UnsetType
    ) = msgspec.UNSET


class AlertList(msgspec.Struct, frozen=True, kw_only=True):
    """``next`` is the ``before`` of the next page; null on the last."""

    object: Literal["list"] = "list"
    data: tuple[Alert, ...]
    next: int | None
    fortpoint: wire.Note


class StatisticsList(msgspec.Struct, frozen=True, kw_only=True):
    """``thresholds`` are what is watched now; rows of what was watched before stay."""

    object: Literal["list"] = "list"
    thresholds: dict[str, float]
    data: tuple[FeatureCount, ...]
    next: int | None
    fortpoint: wire.Note


@get("/api/alerts")
async def list_alerts(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    steps.require(await steps.admit(request, exchange), "operator")
    ask = paging.query(request, AlertsQuery)
    ledger = exchange.services.ledger
    found = () if ledger is None else await ledger.alerts(ask.limit, ask.before)
    exchange.answers(found)
    await exchange.record(record.answered(exchange))
    more = len(found) == ask.limit
    return steps.json(
        AlertList(data=found, next=found[-1].number if more else None, fortpoint=exchange.note())
    )


@get("/api/features/stats")
async def list_statistics(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    services = exchange.services
    steps.require(await steps.admit(request, exchange), "operator")
    ask = paging.query(request, StatisticsQuery)
    key_id = None if ask.key_id is msgspec.UNSET else ask.key_id
    await services.watch.flush()
    found: tuple[FeatureCount, ...] = ()
    if services.ledger is not None:
        found = await services.ledger.statistics(ask.limit, ask.offset, key_id)
    exchange.answers(found)
    await exchange.record(record.answered(exchange))
    return steps.json(
        StatisticsList(
            thresholds=services.watch.thresholds,
            data=found,
            next=ask.offset + ask.limit if len(found) == ask.limit else None,
            fortpoint=exchange.note(),
        )
    )
