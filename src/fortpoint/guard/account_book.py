"""Accounts as operators see them, and their decisions.

    await cards(ledger, settings, limit=100)
    await of(ledger, settings, "key:abc", limit=50)         # with evidence and links
    async with kept_if_recorded(ledger, account):
        detail = await decide(ledger, account, "active", by="grace", reason="appeal accepted")
        ...                                                 # the record gets ``detail``

A decision holds from the account's next request on, in every process: each request asks the
database for its account's status.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Literal

import msgspec

from fortpoint.errors import AuditUnavailable, InvalidRequest, StorageError
from fortpoint.guard.account import AccountPolicy, Standing
from fortpoint.guard.account_ledger import (
    MAX_REASON_CHARS,
    AccountLedger,
    Evidence,
    Linked,
    Row,
)

Verb = Literal["clear", "suspend", "reinstate"]

ACCOUNT_PATTERN = r"^(key:[a-z0-9]{12}|user:[^\x00-\x1f\x7f]{1,128})$"

_OUTCOME: dict[Verb, Standing] = {
    "clear": "active",
    "suspend": "suspended",
    "reinstate": "active",
}


class AccountCard(msgspec.Struct, frozen=True, kw_only=True):
    """An account's standing. ``risk`` and ``extraction`` are as of now, as far as written."""

    account: str
    status: Standing
    risk: float
    extraction: float
    reason: str
    changed_at: datetime
    changed_by: str


class AccountFile(msgspec.Struct, frozen=True, kw_only=True):
    """An account with what raised its risk (newest first) and whom it is linked with."""

    card: AccountCard
    events: tuple[Evidence, ...]
    links: tuple[Linked, ...]


async def cards(
    ledger: AccountLedger, settings: AccountPolicy, limit: int, offset: int = 0
) -> tuple[AccountCard, ...]:
    """Accounts that have a risk or a standing, the last changed first."""
    return tuple(_card(row, settings) for row in await ledger.list(limit, offset))


async def of(
    ledger: AccountLedger, settings: AccountPolicy, account: str, limit: int
) -> AccountFile:
    """Raises ``InvalidRequest`` and ``NotFound``."""
    check_account(account)
    return AccountFile(
        card=_card(await ledger.require(account), settings),
        events=await ledger.events(account, limit),
        links=await ledger.links(account),
    )


async def decide(ledger: AccountLedger, account: str, verb: Verb, by: str, reason: str) -> str:
    """Carry it out; returns what the record says. Being active means to start without risk.

    Raises ``InvalidRequest``, ``NotFound`` and ``StorageError``.
    """
    check_account(account)
    if len(reason) > MAX_REASON_CHARS or not (reason.isprintable() or not reason):
        raise InvalidRequest(
            f"a reason is at most {MAX_REASON_CHARS} printable characters", param="reason"
        )
    if verb != "suspend":
        before = await ledger.require(account)
        if verb == "clear" and before.status == "suspended":
            raise InvalidRequest("this account is suspended; reinstate it", param="account")
        if verb == "reinstate" and before.status == "active":
            raise InvalidRequest("this account is active", param="account")
    outcome = _OUTCOME[verb]
    await ledger.decide(account, outcome, by, reason, forget=outcome == "active")
    return f"{verb} {account}: {outcome}" + (f", because {reason}" if reason else "")


@asynccontextmanager
async def kept_if_recorded(ledger: AccountLedger, account: str) -> AsyncIterator[None]:
    """What the block decides of this account is undone when it cannot be recorded."""
    before = await ledger.row(account)
    try:
        yield
    except AuditUnavailable:
        with suppress(StorageError):
            await ledger.restore(account, before)
        raise


def check_account(account: str) -> None:
    """Raises ``InvalidRequest``."""
    kind, _, name = account.partition(":")
    if kind not in ("key", "user") or not 1 <= len(name) <= 128 or not name.isprintable():
        raise InvalidRequest("an account is key:ID or user:NAME", param="account")


def _card(row: Row, settings: AccountPolicy) -> AccountCard:
    now = time.time()
    return AccountCard(
        account=row.account,
        status=row.status,
        risk=round(row.state.risk(now, settings), 3),
        extraction=round(row.state.extraction(now, settings), 3),
        reason=row.reason,
        changed_at=row.changed_at,
        changed_by=row.changed_by,
    )
