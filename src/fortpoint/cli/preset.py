"""``fortpoint preset``: save steering under a name, and say whose keys have it.

    fortpoint preset save golden-gate-6 --steer golden-gate=6
    fortpoint preset assign golden-gate-6 --key KEY_ID --always

A key may ask for its presets by name (``fortpoint.preset``); one that it has always is applied
to each of its requests. Every change is in the audit log, or it is undone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint.cli.steer import Mode, Scope
from fortpoint.errors import EngineUnavailable, InvalidRequest

if TYPE_CHECKING:
    from fortpoint.access.presets import Preset
    from fortpoint.config import Config
    from fortpoint.gateway.presets import PresetCard
    from fortpoint.gateway.white_box import SteerField

app = typer.Typer(help="Save steering, and give it to keys.", no_args_is_help=True)

_MAX_FILE_BYTES = 64 * 1024

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="The preset's name.")]


@app.command()
def save(
    name: Name,
    steer: Annotated[
        list[str] | None,
        typer.Option("--steer", help="TARGET=STRENGTH; may be given again."),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Of every --steer.")] = Mode.clamp,
    scope: Annotated[Scope, typer.Option(help="Of every --steer.")] = Scope.all,
    file: Annotated[
        Path | None, typer.Option(help="JSON instead: a list as in the API's `steer`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Save steering under a name; one of this name is replaced."""
    text = _written(steer, mode, scope, file)
    preset, tried = asyncio.run(_save(name, text))
    if as_json:
        _print_json({"saved": preset.name, "sha256": preset.sha256, "tried": tried})
        return
    typer.echo(f"Saved {preset.name} for {preset.model}, sha256 {preset.sha256[:16]}...")
    if not tried:
        typer.echo("No server runs here, so it was not tried on the model.", err=True)


@app.command("list")
def list_presets(as_json: Json = False) -> None:
    """List every preset and whose keys have it."""
    cards = asyncio.run(_list())
    if as_json:
        _print_json(cards)
    elif cards:
        _print_table(cards)
    else:
        typer.echo("There are no presets. Make one: fortpoint preset save NAME --steer TARGET=6")


@app.command("rm")
def remove(name: Name, as_json: Json = False) -> None:
    """Forget a preset. One that a key has always must be taken from it first."""
    asyncio.run(_remove(name))
    if as_json:
        _print_json({"removed": name})
    else:
        typer.echo(f"Removed {name}.")


@app.command()
def assign(
    name: Name,
    key: Annotated[str, typer.Option("--key", help="The key's id, as `key list` shows it.")],
    always: Annotated[
        bool, typer.Option("--always", help="Apply it to every request of the key.")
    ] = False,
    take: Annotated[bool, typer.Option("--take", help="Take it from the key instead.")] = False,
    as_json: Json = False,
) -> None:
    """Let a key ask for a preset, or have it always; or take it away."""
    if always and take:
        raise InvalidRequest("--always and --take are one or the other")
    said = asyncio.run(_assign(name, key, always, take))
    if as_json:
        _print_json({"preset": name, "key_id": key, "always": always, "taken": take})
    else:
        typer.echo(f"{said[0].upper()}{said[1:]}.")


def _written(steer: list[str] | None, mode: Mode, scope: Scope, file: Path | None) -> bytes:
    """The steers as JSON. Raises ``InvalidRequest``."""
    if (file is None) == (not steer):
        raise InvalidRequest("give the steers with --steer or in a --file")
    if file is None:
        fields = [_field(text, mode, scope) for text in steer or ()]
        return msgspec.json.encode(fields)
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise InvalidRequest(f"{file} is larger than {_MAX_FILE_BYTES} bytes")
    return text


def _field(text: str, mode: Mode, scope: Scope) -> dict[str, Any]:
    target, equals, strength = text.rpartition("=")
    if mode is Mode.ablate and not equals:
        return {"mode": mode.value, "target": text, "scope": scope.value}
    try:
        number = float(strength if target else "")
    except ValueError:
        raise InvalidRequest(
            f"--steer {text!r} is not of the form TARGET=STRENGTH", param="steer"
        ) from None
    return {"mode": mode.value, "target": target, "strength": number, "scope": scope.value}


async def _save(name: str, text: bytes) -> tuple[Preset, bool]:
    """The preset, and whether a running engine has tried it."""
    from fortpoint.access.presets import PresetBook, check_name
    from fortpoint.cli import record
    from fortpoint.config import load
    from fortpoint.gateway import presets

    config = load()
    check_name(name)
    steer = presets.read_steers(text)
    model = await _tried(config, steer)
    preset = presets.made(name, model or config.engine.model, steer, record.login())
    async with record.opened(config.state_path) as (database, log):
        book = PresetBook(database)
        async with book.kept_if_recorded(name):
            await book.save(preset)
            await record.append(log, "cli preset save", presets.described(preset))
    return preset, model is not None


async def _tried(config: Config, steer: list[SteerField]) -> str | None:
    """The name of the model that carried the steers out; None where no server runs."""
    from fortpoint.cli.steer import running_engine
    from fortpoint.gateway import presets
    from fortpoint.home import Home

    try:
        async with running_engine(Home(config.home_path).engine_socket) as (engine, model):
            await presets.try_out(engine, model, steer, "preset")
            return model.model
    except EngineUnavailable:
        return None


async def _list() -> tuple[PresetCard, ...]:
    from fortpoint.access.presets import PresetBook
    from fortpoint.config import load
    from fortpoint.gateway import presets
    from fortpoint.store.location import locate

    database = locate(load()).open()
    try:
        await database.migrate()
        return tuple(presets.card(one) for one in await PresetBook(database).list())
    finally:
        await database.close()


async def _remove(name: str) -> None:
    from fortpoint.access.presets import PresetBook
    from fortpoint.cli import record
    from fortpoint.config import load

    async with record.opened(load().state_path) as (database, log):
        book = PresetBook(database)
        async with book.kept_if_recorded(name):
            await book.remove(name)
            await record.append(log, "cli preset rm", f"remove preset {name}")


async def _assign(name: str, key: str, always: bool, take: bool) -> str:
    """What was done, as the record says it."""
    from fortpoint.access.presets import PresetBook
    from fortpoint.cli import record
    from fortpoint.config import load

    async with record.opened(load().state_path) as (database, log):
        book = PresetBook(database)
        async with book.kept_if_recorded(name):
            if take:
                await book.unassign(name, key)
                said = f"took preset {name} from key {key}"
            else:
                before = await book.assign(name, key, always=always)
                said = f"gave preset {name} to key {key}"
                said += ", always" if always else ""
                said += f", in the place of {before}" if before else ""
            await record.append(log, "cli preset assign", said)
    return said


def _print_table(cards: tuple[PresetCard, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "model", "steers", "keys", "always for")
    for card in cards:
        steers = "\n".join(
            f"{one.mode} {one.target}" + ("" if one.mode == "ablate" else f" {one.strength:g}")
            for one in card.steer
        )
        cells = (card.name, card.model, steers, "\n".join(card.keys), "\n".join(card.default_of))
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    Console().print(table)


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.encode(value).decode())
