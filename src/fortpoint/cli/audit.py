"""``fortpoint audit``: verify the record, show, export and witness it, erase what was said.

Verifying and exporting open the database read-only and may run beside a serving gateway.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fortpoint.cli import audit_witness
from fortpoint.errors import NotFound, VerificationError

if TYPE_CHECKING:
    from sqlalchemy import URL

    from fortpoint.audit.checkpoint import Checkpoint, VerifierKey
    from fortpoint.audit.entry import Entry
    from fortpoint.audit.history import Recorded
    from fortpoint.store.location import Location

app = typer.Typer(help="Verify, read and witness the record.", no_args_is_help=True)
app.command("witness")(audit_witness.witness)

_PROGRESS_FROM = 20_000  # entries; below, verifying is over before a bar is drawn
_MAX_FILE_BYTES = 16 * 1024

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of all state; FORTPOINT_HOME where absent.")
]


@app.command()
def verify(
    as_json: Json = False,
    home: Home = None,
    public_key: Annotated[
        str | None,
        typer.Option(
            "--public-key",
            help="The log's verifier key, kept by you; else state/keys/audit.pub of the home.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="A checkpoint you kept: the log must continue it."),
    ] = None,
) -> None:
    """Check every entry and every signature; name the first entry that is not as recorded."""
    import msgspec

    from fortpoint.audit import verify as verification
    from fortpoint.audit.checkpoint import VerifierKey
    from fortpoint.audit.signing_key import load_public

    location = _location(home)
    folder = location.state
    try:
        where = _where(location)
        key = VerifierKey.parse(public_key) if public_key else load_public(folder)
        kept = _kept(checkpoint, key)
        with _progress() as on_progress:
            report = verification.verify(where, key, kept=kept, on_progress=on_progress)
    except VerificationError as error:
        if as_json:
            failure = {"verified": False, "error": error.message, "at": error.param}
            typer.echo(msgspec.json.encode(failure).decode())
        raise
    if as_json:
        success = {"verified": True, **msgspec.structs.asdict(report)}
        typer.echo(msgspec.json.encode(success).decode())
        return
    typer.echo(
        f"Verified: {report.entries} entries, {report.checkpoints} signed checkpoints\n"
        f"  log   {report.origin}\n  root  {report.root}"
    )


@app.command()
def show(
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=100_000, help="How many of the newest.")
    ] = 20,
    as_json: Json = False,
    home: Home = None,
) -> None:
    """Show the newest entries."""
    import asyncio

    import msgspec

    records = asyncio.run(_recent(_location(home), limit))
    if as_json:
        typer.echo(msgspec.json.encode(records).decode())
    elif records:
        _print_table(records)
    else:
        typer.echo("The log has no entries yet.")


@app.command()
def checkpoint(as_json: Json = False, home: Home = None) -> None:
    """Print the newest signed checkpoint. Keep it elsewhere, to verify against it later."""
    import asyncio
    import json

    from fortpoint.audit.signing_key import load_public

    location = _location(home)
    note = asyncio.run(_newest_checkpoint(location))
    opened = load_public(location.state).open_checkpoint(note)
    if not as_json:
        typer.echo(note.decode(), nl=False)
        return
    fields = {
        "origin": opened.origin,
        "size": opened.size,
        "root": opened.root_hash.hex(),
        "note": note.decode(),
    }
    typer.echo(json.dumps(fields))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="File to write; it must not exist.")],
    as_json: Json = False,
    home: Home = None,
) -> None:
    """Write the whole log to a file that scripts/verify_audit.py verifies elsewhere.

    Entries and checkpoints, as the log has them; none of what was asked and answered.
    """
    import msgspec

    from fortpoint.audit.export import export as write

    with _progress() as on_progress:
        exported = write(_where(_location(home)), file, on_progress)
    if as_json:
        typer.echo(msgspec.json.encode(exported).decode())
        return
    typer.echo(
        f"Exported: {exported.entries} entries, {exported.checkpoints} checkpoints\n  {file}"
    )


@app.command()
def erase(
    request_id: Annotated[str, typer.Argument(help="As an answer's x-request-id has it.")],
    as_json: Json = False,
    home: Home = None,
) -> None:
    """Erase what a request asked and was answered, and the salt of its hashes.

    Its entry and every proof stay valid, and say nothing of it any more. The erasure is itself
    recorded. Backups that were made before are out of reach.
    """
    import asyncio
    import json

    scrubbed = asyncio.run(_erase(_location(home), request_id))
    if as_json:
        typer.echo(json.dumps({"erased": request_id, "scrubbed": scrubbed}))
        return
    typer.echo(f"Erased: the content of {request_id}")
    if not scrubbed:
        typer.echo("  the write-ahead log still has it; a later checkpoint overwrites that")


def _location(home: Path | None) -> Location:
    """Where the database is, and the folder of the log's keys."""
    from fortpoint.config import load
    from fortpoint.store.location import locate

    return locate(load(flags=() if home is None else (f"home={home}",)))


def _where(location: Location) -> Path | URL:
    """What a snapshot is taken of."""
    if location.url is not None:
        return location.url
    database = location.state / "fortpoint.db"
    if not database.exists():
        raise VerificationError(f"there is no log in {location.state.parent}")
    return database


def _kept(path: Path | None, key: VerifierKey) -> Checkpoint | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return key.open_checkpoint(file.read(_MAX_FILE_BYTES))
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror}") from None
    except VerificationError as error:
        raise VerificationError(f"{path}: {error.message}") from None


async def _recent(location: Location, limit: int) -> tuple[Recorded, ...]:
    from fortpoint.audit.history import recent

    _check_present(location)
    database = location.open()
    try:
        await database.migrate()
        return await recent(database, limit)
    finally:
        await database.close()


async def _erase(location: Location, request_id: str) -> bool:
    """Together with its record, or not at all. Whether it has left the files too."""
    from fortpoint.audit.erasure import check_erasable
    from fortpoint.audit.erasure import erase as erase_content
    from fortpoint.cli import record
    from fortpoint.store.tables import audit_contents

    _check_present(location)
    async with record.opened(location) as (database, log):
        await database.read(lambda connection: check_erasable(connection, request_id))
        await record.append(
            log,
            "cli audit erase",
            f"content of {request_id} erased",
            also=lambda connection: erase_content(connection, request_id),
        )
        return await database.scrub(audit_contents)


async def _newest_checkpoint(location: Location) -> bytes:
    from fortpoint.audit.history import newest_checkpoint

    _check_present(location)
    database = location.open()
    try:
        await database.migrate()
        return await newest_checkpoint(database)
    finally:
        await database.close()


def _check_present(location: Location) -> None:
    if location.url is None and not (location.state / "fortpoint.db").exists():
        raise NotFound(f"there is no log in {location.state.parent}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, once a log turns out to be long; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Verifying", visible=False)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total >= _PROGRESS_FROM)

        yield advance


def _print_table(records: tuple[Recorded, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("index", "time (UTC)", "kind", "who", "surface", "result")
    for column in table.columns[:3]:
        column.no_wrap = True
    for record in records:
        entry = record.entry
        cells = (
            str(record.index),
            entry.time[:19].replace("T", " "),
            entry.kind,
            entry.user or "",
            entry.surface,
            _result(entry),
        )
        table.add_row(*(Text(_printable(cell), overflow="fold") for cell in cells))
    Console().print(table)


def _result(entry: Entry) -> str:
    blocked_by = entry.verdict.detector if entry.verdict else None
    parts = (str(entry.status), entry.code, blocked_by, entry.detail, _inside(entry))
    return " ".join(part for part in parts if part)


def _inside(entry: Entry) -> str:
    """What was changed and read inside the model, in a few words."""
    from fortpoint.audit.entry import Inside

    inside = entry.inside
    if not isinstance(inside, Inside):
        return ""
    parts = [f"preset {preset.name}" for preset in inside.presets]
    parts += [f"{inside.steers} steers"] if inside.steers else []
    parts += [f"{inside.stop_when} stop_when"] if inside.stop_when else []
    parts += [f"watch {name}" for name in inside.watch]
    parts += [f"adapter {inside.adapter}"] if inside.adapter else []
    parts += [f"alert {target}" for target in inside.alerts]
    return ", ".join(parts)


def _printable(text: str) -> str:
    # Entries hold what callers sent: no escape sequence may reach the terminal.
    return "".join(character if character.isprintable() else "?" for character in text)
