"""Accounts' risk as operators read it, and the end of its consequences.

    GET  /api/accounts                          those with a risk or a consequence
    GET  /api/accounts/evidence?account=...     one of them, with evidence and links
    POST /api/accounts/decisions                {"account": ..., "do": "reinstate", "reason": ...}

A decision is in the record, or it is undone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, get, post
from litestar.types import ASGIApp
from msgspec import Meta

from fortpoint.errors import NotFound
from fortpoint.gateway import paging, record, steps, wire
from fortpoint.gateway.exchange import Exchange
from fortpoint.guard import account_book
from fortpoint.guard.account import AccountPolicy
from fortpoint.guard.account_book import ACCOUNT_PATTERN, AccountCard, AccountFile, Verb
from fortpoint.guard.account_ledger import MAX_REASON_CHARS, AccountLedger

MAX_ROWS = 1000
_ROWS = 100
_MAX_OFFSET = 2**53

AccountName = Annotated[str, Meta(pattern=ACCOUNT_PATTERN, description="`key:ID` or `user:NAME`.")]


class AccountsQuery(msgspec.Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="Accounts at most.")] = _ROWS
    offset: Annotated[int, Meta(ge=0, le=_MAX_OFFSET, description="Accounts to leave out.")] = 0


class EvidenceQuery(msgspec.Struct, frozen=True):
    account: AccountName
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS, description="Events at most.")] = _ROWS


class DecideAccount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``clear`` ends slowing and review, ``reinstate`` a suspension; both forget the risk."""

    account: AccountName
    do: Verb
    reason: Annotated[
        str,
        Meta(max_length=MAX_REASON_CHARS, extra_json_schema={"pattern": "^[^\\u0000-\\u001f]*$"}),
    ] = ""


class AccountList(msgspec.Struct, frozen=True, kw_only=True):
    """``next`` is the ``offset`` of the next page; null on the last."""

    object: Literal["list"] = "list"
    data: tuple[AccountCard, ...]
    next: int | None
    fortpoint: wire.Note


class AccountShown(msgspec.Struct, frozen=True, kw_only=True):
    account: AccountFile
    fortpoint: wire.Note


class AccountDecided(msgspec.Struct, frozen=True, kw_only=True):
    account: str
    done: Verb
    fortpoint: wire.Note


@get("/api/accounts")
async def list_accounts(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    steps.require(await steps.admit(request, exchange), "operator")
    ask = paging.query(request, AccountsQuery)
    ledger, settings = await _kept(exchange)
    found = await account_book.cards(ledger, settings, ask.limit, ask.offset)
    exchange.answers(found)
    await exchange.record(record.answered(exchange))
    more = len(found) == ask.limit
    return steps.json(
        AccountList(
            data=found, next=ask.offset + ask.limit if more else None, fortpoint=exchange.note()
        )
    )


@get("/api/accounts/evidence")
async def show_account(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    steps.require(await steps.admit(request, exchange), "operator")
    ask = paging.query(request, EvidenceQuery)
    ledger, settings = await _kept(exchange)
    found = await account_book.of(ledger, settings, ask.account, ask.limit)
    exchange.detail = f"show {ask.account}"
    exchange.answers([found])
    await exchange.record(record.answered(exchange))
    return steps.json(AccountShown(account=found, fortpoint=exchange.note()))


@post("/api/accounts/decisions", status_code=200)
async def decide_account(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    principal = await steps.admit(request, exchange)
    steps.require(principal, "operator")
    ask = wire.decode(await steps.body(request, exchange), DecideAccount)
    ledger, _ = await _kept(exchange)
    async with account_book.kept_if_recorded(ledger, ask.account):
        exchange.detail = await account_book.decide(
            ledger, ask.account, ask.do, principal.user, ask.reason
        )
        exchange.answers([ask.account, ask.do])
        await exchange.record(record.answered(exchange))
    return steps.json(AccountDecided(account=ask.account, done=ask.do, fortpoint=exchange.note()))


async def _kept(exchange: Exchange) -> tuple[AccountLedger, AccountPolicy]:
    """The accounts on disk, with what this process still had to write."""
    desk = exchange.services.conduct.desk
    if desk is None:
        raise NotFound("this server keeps no accounts' risk (guard.enabled, account.enabled)")
    await desk.flush()
    return desk.ledger, desk.settings
