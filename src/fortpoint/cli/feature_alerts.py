"""``fortpoint features alerts`` and ``stats``: where watched features were active, and for whom.

Both read the database of this home and may run beside a serving gateway, which writes its
statistics every few seconds.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

if TYPE_CHECKING:
    from fortpoint.gateway.watch_ledger import Alert, FeatureCount

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="Rows at most.")]


def alerts(
    limit: Limit = 20,
    before: Annotated[
        int | None, typer.Option(min=1, help="Go on from this alert's number.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where watched features were over their thresholds, newest first."""
    found, _ = asyncio.run(_read(limit, before))
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    elif found:
        _print_alerts(found)
    else:
        typer.echo("There are no alerts. What is watched is the setting watch.targets.")


def stats(limit: Limit = 100, as_json: Json = False) -> None:
    """Show how often each key's requests made watched features active."""
    _, found = asyncio.run(_read(limit, None))
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    elif found:
        _print_statistics(found)
    else:
        typer.echo("Nothing was watched yet. What is watched is the setting watch.targets.")


async def _read(
    limit: int, before: int | None
) -> tuple[tuple[Alert, ...], tuple[FeatureCount, ...]]:
    from fortpoint.config import load
    from fortpoint.gateway.watch_ledger import WatchLedger
    from fortpoint.store.location import locate

    database = locate(load()).open()
    try:
        await database.migrate()
        ledger = WatchLedger(database)
        return await ledger.alerts(limit, before), await ledger.statistics(limit)
    finally:
        await database.close()


def _print_alerts(found: tuple[Alert, ...]) -> None:
    columns = ("number", "time (UTC)", "target", "value", "above", "where", "key", "request")
    _print_table(
        columns,
        [
            (
                str(alert.number),
                f"{alert.time:%Y-%m-%d %H:%M:%S}",
                alert.target,
                f"{alert.value:.2f}",
                f"{alert.threshold:.2f}",
                f"{alert.role.value}, {alert.part}" + (", steered" if alert.steered else ""),
                alert.key_id,
                alert.request_id,
            )
            for alert in found
        ],
    )


def _print_statistics(found: tuple[FeatureCount, ...]) -> None:
    columns = ("key", "target", "tokens", "over", "maximum", "last over (UTC)")
    _print_table(
        columns,
        [
            (
                count.key_id,
                count.target,
                f"{count.tokens:,}",
                f"{count.tokens_over:,}",
                f"{count.maximum:.2f}",
                f"{count.last_over_at:%Y-%m-%d %H:%M:%S}" if count.last_over_at else "",
            )
            for count in found
        ],
    )


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)
