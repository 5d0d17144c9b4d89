"""``fortpoint serve``: from nothing to an address, a key and something to paste."""

from __future__ import annotations

import asyncio
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from fortpoint import config as configuration
from fortpoint.access.keys import NewKey
from fortpoint.cli.progress import Progress
from fortpoint.config import Config
from fortpoint.engine.protocol import Description
from fortpoint.home import Home

_FIRST_USER = "first-customer"


def serve(
    config: Annotated[
        Path | None, typer.Option(help="Configuration file (TOML).", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, as section.key=value.", show_default=False),
    ] = None,
) -> None:
    """Start the engine and the gateway; fetch the model and make a first key if need be."""
    flags = list(settings or ())
    if port is not None:
        flags.append(f"server.port={port}")
    loaded = configuration.load(config, flags=flags)
    home = Home(loaded.home_path)
    home.make()
    with home.locked():
        raise typer.Exit(_serve(loaded, home))


def _serve(config: Config, home: Home) -> int:
    from fortpoint import supervisor
    from fortpoint.vault.model_folder import MANIFEST, model_path
    from fortpoint.vault.pull import pull

    started = time.monotonic()
    listener = supervisor.listen(config.server.host, config.server.port)
    if not (model_path(home.path, config.engine.model) / MANIFEST).is_file():
        with Progress() as progress:
            pull(config.engine.model, home.path, progress.update)
    first_key = asyncio.run(_first_key(home))
    address = f"http://{config.server.host}:{listener.getsockname()[1]}"

    def on_ready(engine: Description) -> None:
        say(f"ready in {time.monotonic() - started:.1f} s")
        print(banner(address, engine, first_key), flush=True)

    return asyncio.run(
        supervisor.run(
            supervisor.engine_child(config, home, probes(config)),
            supervisor.gateway_child(config, home, listener),
            home,
            on_ready,
            say,
        )
    )


def probes(config: Config) -> Path | None:
    """The stem of the linear probes that the engine reads, None when they are off."""
    if not (config.guard.enabled and config.guard.probes):
        return None
    return Path(str(resources.files("fortpoint.guard"))) / "artefacts" / "probes"


async def _first_key(home: Home) -> NewKey | None:
    """A customer's key when there is none at all; recorded before it is shown."""
    from fortpoint.access.keys import KeyRing
    from fortpoint.cli.key import create_recorded
    from fortpoint.store.database import Database

    database = Database.in_home(home.state)
    try:
        await database.migrate()
        empty = await KeyRing(database).is_empty()
    finally:
        await database.close()
    return await create_recorded(home.state, _FIRST_USER, "customer", None) if empty else None


def banner(address: str, engine: Description, first_key: NewKey | None) -> str:
    """What to know and what to paste, once it runs."""
    protected = [name.replace("_", " ") for name, on in engine.protections.items() if on]
    lines = [
        "",
        f"  Fort Point serves {engine.model} ({engine.dtype}) at {address}",
        f"  engine: process {engine.pid}; {', '.join(protected) or 'no protections'}",
        "",
    ]
    if first_key is not None:
        lines += [
            f"  Your key, shown this once:  {first_key.secret}",
            "  More of them:               fortpoint key create --user NAME --role customer",
        ]
        token = first_key.secret
    else:
        lines.append(
            "  Use a key you have, or:     fortpoint key create --user NAME --role customer"
        )
        token = "YOUR_KEY"  # noqa: S105 - a stand-in
    return "\n".join(
        [
            *lines,
            "",
            "  Try it:",
            f"    curl {address}/v1/chat/completions \\",
            f"      -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json' \\",
            f'      -d \'{{"model": "{engine.model}", "messages": '
            '[{"role": "user", "content": "What is the Golden Gate?"}]}\'',
            "",
            "  Then: fortpoint audit verify    Stop with Ctrl-C.",
            "",
        ]
    )


def say(line: str) -> None:
    """A line for whoever runs the server."""
    print(f"fortpoint: {line}", file=sys.stderr, flush=True)
