"""``fortpoint serve``: from nothing to an address, a key and something to paste."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from fortpoint import config as configuration
from fortpoint.cli.progress import Progress
from fortpoint.config import Config
from fortpoint.engine.protocol import Description
from fortpoint.engine.upstream.observer import is_upstream, runs_a_model
from fortpoint.engine.upstream.target import Target, load_targets
from fortpoint.errors import ConfigError
from fortpoint.features.watched import watched
from fortpoint.gateway import policy_source
from fortpoint.guard.canaries import load_canaries
from fortpoint.home import Home
from fortpoint.store.address import read_address

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
    """Start the engine and the gateway; fetch the model and make a first key if need be.

    With engine.kind=upstream other servers answer, and a model of our own only reads along for
    the guard's probes; without probes there is none.
    """
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

    started = time.monotonic()
    # What is wrong with the upstreams, with what is watched and with the canaries is said here,
    # before anything runs.
    targets = load_targets(config.upstream) if is_upstream(config) else ()
    watched(config)
    load_canaries(config.guard.canaries)
    policy_source.load(config)
    read_address(config)
    listener = supervisor.listen(config.server.host, config.server.port)
    if runs_a_model(config):
        _fetch(config.engine.model, home)
    first_key = _made_first_key(config)
    host, port = listener.getsockname()[:2]
    address = f"http://{config.server.host}:{port}"

    def on_ready(engine: Description | None) -> None:
        say(f"ready in {time.monotonic() - started:.1f} s")
        print(banner(address, what_runs(config, targets, engine), first_key), flush=True)

    async def run() -> int:
        has_engine = runs_a_model(config)
        return await supervisor.run(
            supervisor.engine_child(config, home, probes(config)) if has_engine else None,
            supervisor.gateway_child(config, home, listener),
            supervisor.announce(
                home.engine_socket if has_engine else None, (host, port), on_ready, say
            ),
            say,
        )

    return asyncio.run(run())


def _fetch(model: str, home: Home) -> None:
    from fortpoint.vault.model_folder import MANIFEST, model_path
    from fortpoint.vault.pull import pull

    if not (model_path(home.path, model) / MANIFEST).is_file():
        with Progress() as progress:
            pull(model, home.path, progress.update)


def probes(config: Config) -> Path | None:
    """The stem of the linear probes that the engine reads, None when they are off."""
    if not (config.guard.enabled and config.guard.probes):
        return None
    return Path(str(resources.files("fortpoint.guard"))) / "artefacts" / "probes"


def _made_first_key(config: Config) -> str | None:
    """In a process that ends: the database's library would stay in this one, at 40 MB."""
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as processes:
        return processes.submit(_run_first_key, config).result()


def _run_first_key(config: Config) -> str | None:
    return asyncio.run(_first_key(config))


async def _first_key(config: Config) -> str | None:
    """A customer's key when there is none at all; recorded before it is shown."""
    from fortpoint.access.keys import KeyRing
    from fortpoint.cli.key import create_recorded
    from fortpoint.store.location import locate

    location = locate(config)
    database = location.open()
    try:
        await database.migrate()
        empty = await KeyRing(database).is_empty()
    finally:
        await database.close()
    if not empty:
        return None
    return (await create_recorded(location, _FIRST_USER, "customer", None)).secret


@dataclass(frozen=True)
class Running:
    """What the banner says of it: the model's name, its precision if known, who answers."""

    model: str
    precision: str | None
    about: tuple[str, ...]


def what_runs(config: Config, targets: Sequence[Target], engine: Description | None) -> Running:
    """``engine`` is the process of our own, which upstreams need only as an observer."""
    own = "none; the guard reads no probes"
    if engine is not None:
        protected = [name.replace("_", " ") for name, on in engine.protections.items() if on]
        own = f"process {engine.pid}; {', '.join(protected) or 'no protections'}"
    if targets:
        servers = ", then ".join(target.name for target in targets)
        about = (f"upstream: {servers}", f"observer: {own}")
        return Running(config.upstream.model, None, about)
    if engine is None:
        raise ConfigError("without upstreams an engine of our own must run")
    return Running(engine.model, engine.dtype, (f"engine: {own}",))


def banner(address: str, running: Running, first_key: str | None) -> str:
    """What to know and what to paste, once it runs."""
    precision = f" ({running.precision})" if running.precision else ""
    lines = [
        "",
        f"  Fort Point serves {running.model}{precision} at {address}",
        *(f"  {line}" for line in running.about),
        "",
    ]
    if first_key is not None:
        lines += [
            f"  Your key, shown this once:  {first_key}",
            "  More of them:               fortpoint key create --user NAME --role customer",
        ]
        token = first_key
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
            f'      -d \'{{"model": "{running.model}", "messages": '
            '[{"role": "user", "content": "What is the Golden Gate?"}]}\'',
            "",
            "  Then: fortpoint audit verify    Stop with Ctrl-C.",
            "",
        ]
    )


def say(line: str) -> None:
    """A line for whoever runs the server."""
    print(f"fortpoint: {line}", file=sys.stderr, flush=True)
