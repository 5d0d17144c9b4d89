"""``fortpoint guard accounts``: whose risk is high, why, and to end what was done about it.

    fortpoint guard accounts list
    fortpoint guard accounts show key:KEY_ID
    fortpoint guard accounts reinstate key:KEY_ID --reason "appeal accepted"

Beside a serving gateway each decision holds from the next request on. Every decision is in the
audit log, or it is undone. Evidence is request ids, scores, times and hashes; no content.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

if TYPE_CHECKING:
    from fortpoint.guard.account import AccountPolicy
    from fortpoint.guard.account_book import AccountCard, AccountFile, Verb
    from fortpoint.guard.account_ledger import AccountLedger

app = typer.Typer(help="Show accounts' risk and end its consequences.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="Rows at most.")]
Account = Annotated[str, typer.Argument(help="key:ID or user:NAME, as `list` shows it.")]
Reason = Annotated[str, typer.Option(help="Why; it goes into the record.")]


@app.command("list")
def list_accounts(limit: Limit = 100, as_json: Json = False) -> None:
    """List accounts that have a risk or a consequence, the last changed first."""
    cards = asyncio.run(_list(limit))
    if as_json:
        typer.echo(msgspec.json.encode(cards).decode())
    elif cards:
        _print_cards(cards)
    else:
        typer.echo("No account has a risk.")


@app.command()
def show(account: Account, limit: Limit = 50, as_json: Json = False) -> None:
    """Show an account with its evidence and its links, the newest first."""
    found = asyncio.run(_show(account, limit))
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        _print_file(found)


@app.command()
def clear(account: Account, reason: Reason = "", as_json: Json = False) -> None:
    """Forget an account's risk, and end slowing and review. Not a suspension: see reinstate."""
    _decide("clear", account, reason, as_json)


@app.command()
def suspend(account: Account, reason: Reason = "", as_json: Json = False) -> None:
    """Refuse every request of an account from the next one on."""
    _decide("suspend", account, reason, as_json)


@app.command()
def reinstate(account: Account, reason: Reason = "", as_json: Json = False) -> None:
    """End a suspension; the account starts without risk. Its evidence is kept."""
    _decide("reinstate", account, reason, as_json)


def _decide(verb: Verb, account: str, reason: str, as_json: bool) -> None:
    detail = asyncio.run(_decided(verb, account, reason))
    if as_json:
        typer.echo(msgspec.json.encode({"account": account, "done": verb}).decode())
    else:
        typer.echo(f"{detail}. It holds from the next request on.")


async def _decided(verb: Verb, account: str, reason: str) -> str:
    from fortpoint.cli import record
    from fortpoint.config import load
    from fortpoint.guard.account_book import decide, kept_if_recorded
    from fortpoint.guard.account_ledger import AccountLedger

    async with record.opened(load().state_path) as (database, log):
        ledger = AccountLedger(database)
        async with kept_if_recorded(ledger, account):
            detail = await decide(ledger, account, verb, record.login(), reason)
            await record.append(log, f"cli guard accounts {verb}", detail)
    return detail


async def _list(limit: int) -> tuple[AccountCard, ...]:
    from fortpoint.guard.account_book import cards

    async with _opened() as (ledger, settings):
        return await cards(ledger, settings, limit)


async def _show(account: str, limit: int) -> AccountFile:
    from fortpoint.guard.account_book import of

    async with _opened() as (ledger, settings):
        return await of(ledger, settings, account, limit)


@asynccontextmanager
async def _opened() -> AsyncIterator[tuple[AccountLedger, AccountPolicy]]:
    """This home's accounts, and the bounds of its policy."""
    from fortpoint.cli.guard_policy import current
    from fortpoint.config import load
    from fortpoint.guard.account_ledger import AccountLedger
    from fortpoint.store.location import locate

    config = load()
    policy = current(config.guard.policy)
    database = locate(config).open()
    try:
        await database.migrate()
        yield AccountLedger(database), policy.policy.account
    finally:
        await database.close()


def _print_cards(cards: tuple[AccountCard, ...]) -> None:
    rows = [
        (
            card.account,
            card.status,
            f"{card.risk:.2f}",
            f"{card.changed_at:%Y-%m-%d %H:%M:%S}",
            f"{card.reason} ({card.changed_by})".strip(),
        )
        for card in cards
    ]
    _print_table(("account", "status", "risk", "since (UTC)", "why"), rows)


def _print_file(found: AccountFile) -> None:
    _print_cards((found.card,))
    events = [
        (
            f"{event.time:%m-%d %H:%M:%S}",
            event.kind,
            f"{event.weight:.2f}",
            event.detector or "" if event.score is None else f"{event.detector} {event.score:.3f}",
            "\n".join(filter(None, (event.request_id, event.family, *event.others))),
        )
        for event in found.events
    ]
    _print_table(("time (UTC)", "what", "weight", "score", "request, family, with"), events)
    if found.links:
        links = [
            (link.other, link.family, str(link.times), f"{link.last_at:%Y-%m-%d %H:%M:%S}")
            for link in found.links
        ]
        _print_table(("linked with", "family", "times", "last (UTC)"), links)


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)
