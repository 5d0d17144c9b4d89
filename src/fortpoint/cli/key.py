"""``fortpoint key``: make, list and revoke the keys that callers present.

Every change is recorded in the audit log before it is reported, and a new key's secret is
shown only once its entry is on disk.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fortpoint.errors import AuditUnavailable, InvalidRequest, StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from fortpoint.access.keys import KeyRecord, NewKey, RoleName
    from fortpoint.store.location import Location

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

_DURATION = re.compile(r"([1-9][0-9]{0,4})([hdw])", re.ASCII)
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class RoleOption(StrEnum):
    customer = "customer"
    operator = "operator"


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    user: Annotated[str, typer.Option("--user", help="Who will hold the key.")],
    role: Annotated[RoleOption, typer.Option("--role", help="What the key may do.")],
    expires: Annotated[
        str | None,
        typer.Option("--expires", help="When it ends: 12h, 30d, 8w, or an ISO date in UTC."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key and show its secret, this once."""
    import asyncio

    import msgspec

    from fortpoint.config import load

    until = _expiry(expires, datetime.now(UTC))
    new = asyncio.run(create_recorded(load().state_path, user, role.value, until))
    if as_json:
        typer.echo(msgspec.json.encode(new).decode())
        return
    ends = f", until {_moment(new.expires_at)}" if new.expires_at else ""
    typer.echo(f"Key {new.key_id} for {new.user} ({new.role}{ends}):\n\n  {new.secret}\n")
    typer.echo("Keep it now: it is shown only this once.")


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List every key, without secrets."""
    import asyncio

    import msgspec

    records = asyncio.run(_list())
    if as_json:
        typer.echo(msgspec.json.encode(records).decode())
    elif records:
        _print_table(records)
    else:
        typer.echo("There are no keys. Make one: fortpoint key create --user NAME --role customer")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `key list` shows it.")],
    as_json: Json = False,
) -> None:
    """Refuse a key from its next request on."""
    import asyncio
    import json

    asyncio.run(_revoke(key_id))
    typer.echo(json.dumps({"key_id": key_id, "revoked": True}) if as_json else f"Revoked {key_id}.")


async def create_recorded(
    where: Path | Location, user: str, role: RoleName, expires_at: datetime | None
) -> NewKey:
    """A new key of the home (``record.opened``), recorded before it is returned."""
    from fortpoint.access.keys import KeyRing
    from fortpoint.cli import record

    async with record.opened(where) as (database, log):
        keyring = KeyRing(database)
        new = await keyring.create(user, role, expires_at)
        until = f", expires {_moment(expires_at)}" if expires_at else ""
        detail = f"key {new.key_id} for {user} as {role}{until}"
        try:
            await record.append(log, "cli key create", detail)
        except AuditUnavailable:
            # A key nobody knows the secret of does no harm; revoked, it says so in the list.
            with suppress(StorageError):
                await keyring.revoke(new.key_id)
            raise
        return new


async def _list() -> tuple[KeyRecord, ...]:
    from fortpoint.access.keys import KeyRing
    from fortpoint.config import load
    from fortpoint.store.location import locate

    database = locate(load()).open()
    try:
        await database.migrate()
        return await KeyRing(database).list()
    finally:
        await database.close()


async def _revoke(key_id: str) -> None:
    from fortpoint.access.keys import KeyRing
    from fortpoint.cli import record
    from fortpoint.config import load

    async with record.opened(load().state_path) as (database, log):
        # Revoked first: should the record fail, the safe half is what has happened.
        await KeyRing(database).revoke(key_id)
        await record.append(log, "cli key revoke", f"key {key_id}")


def _expiry(text: str | None, now: datetime) -> datetime | None:
    """The moment that ``--expires`` names. Raises ``InvalidRequest``."""
    if text is None:
        return None
    if match := _DURATION.fullmatch(text):
        return (now + int(match[1]) * _UNITS[match[2]]).replace(microsecond=0)
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(
            "--expires takes 12h, 30d, 8w, or an ISO date such as 2030-12-31", param="expires"
        ) from None


def _moment(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _state(record: KeyRecord, now: datetime) -> str:
    if record.revoked_at:
        return f"revoked {_moment(record.revoked_at)}"
    if record.expires_at and record.expires_at <= now:
        return f"expired {_moment(record.expires_at)}"
    return f"until {_moment(record.expires_at)}" if record.expires_at else "active"


def _print_table(records: tuple[KeyRecord, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("key id", "user", "role", "created", "state")
    table.columns[0].no_wrap = True
    for record in records:
        cells = (
            record.key_id,
            record.user,
            record.role,
            _moment(record.created_at),
            _state(record, datetime.now(UTC)),
        )
        # As Text: a user name may look like Rich's markup.
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    Console().print(table)
