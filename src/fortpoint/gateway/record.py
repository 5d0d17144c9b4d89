"""Makes the audit entry of an exchange: who, what, how it ended. Content only if configured."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import msgspec

from fortpoint.audit.entry import Entry, Inside, PolicyUse
from fortpoint.errors import FortPointError
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.faults import is_refusal

Kind = Literal["answer", "refusal", "failure", "admin"]

_NOTHING = Inside()

GONE_STATUS = 499
GONE_CODE = "client_disconnected"


def answered(exchange: Exchange, status: int = 200) -> Entry:
    kind: Kind = "admin" if exchange.surface.startswith("/api") else "answer"
    return _entry(exchange, kind, status, None, exchange.detail)


def faulted(exchange: Exchange, fault: FortPointError) -> Entry:
    kind: Kind = "refusal" if is_refusal(fault) else "failure"
    detail = f"{exchange.detail}: {fault.message}" if exchange.detail else fault.message
    return _entry(exchange, kind, fault.status, fault.code, detail)


def gone(exchange: Exchange) -> Entry:
    """The client went away before its last byte; ``usage`` has what was computed for it."""
    return _entry(exchange, "failure", GONE_STATUS, GONE_CODE, exchange.detail)


def _entry(
    exchange: Exchange, kind: Kind, status: int, code: str | None, detail: str | None
) -> Entry:
    principal, model = exchange.principal, exchange.model
    arrived = datetime.fromtimestamp(exchange.arrived_at, UTC)
    return Entry(
        time=arrived.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        kind=kind,
        request_id=exchange.request_id,
        surface=exchange.surface,
        key_id=principal.key_id if principal else None,
        user=principal.user if principal else None,
        role=principal.role if principal else None,
        model=model.model if model else None,
        model_digest=model.digest if model else None,
        status=status,
        code=code,
        finish_reasons=exchange.finish_reasons,
        verdict=exchange.verdict,
        usage=exchange.usage,
        request_sha256=exchange.request_sha256,
        response_sha256=exchange.response_sha256,
        detail=detail,
        inside=_inside(exchange),
        policy=_policy(exchange),
    )


def _policy(exchange: Exchange) -> PolicyUse | msgspec.UnsetType:
    if exchange.services.guard is None:
        return msgspec.UNSET
    return exchange.services.conduct.use(exchange.conducted)


def _inside(exchange: Exchange) -> Inside | msgspec.UnsetType:
    """What was asked of the model's inside, and what was seen there."""
    inside = msgspec.structs.replace(exchange.inside, alerts=exchange.sightings.alerted)
    return msgspec.UNSET if inside == _NOTHING else inside
