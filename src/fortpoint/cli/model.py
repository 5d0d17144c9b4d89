"""``fortpoint model``: what weights are here, where they come from, fetching and removing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fortpoint import config as configuration
from fortpoint.cli.progress import Progress
from fortpoint.home import Home

app = typer.Typer(help="Fetch, list and remove models.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("pull")
def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="A known name (smollm2-135m), hf:organisation/name (@revision), a folder in "
            "Hugging Face's layout, or a .gguf file."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name to keep it under.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a model, check its digests, and keep it as safetensors."""
    from fortpoint.vault.pull import pull as fetch

    home = Home(configuration.load().home_path)
    home.make()
    with Progress() as progress:
        folder = fetch(source, home.path, progress.update, name)
    manifest = folder.manifest
    if as_json:
        _print_json({"name": manifest.name, "digest": manifest.digest, "path": str(folder.path)})
    else:
        typer.echo(f"{manifest.name}  {manifest.digest}  {folder.path}")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Name the models of this home."""
    from rich.console import Console
    from rich.table import Table

    from fortpoint.vault import model_folder

    models = list(model_folder.list_models(configuration.load().home_path))
    if as_json:
        _print_json(
            [{**msgspec.to_builtins(m.manifest), "digest": m.manifest.digest} for m in models]
        )
        return
    if not models:
        typer.echo("no models here; fetch one with `fortpoint model pull smollm2-135m`")
        return
    table = Table("name", "licence", "size", "digest", "source")
    for folder in models:
        n_bytes = sum(file.stat().st_size for file in Path(folder.path).iterdir())
        manifest = folder.manifest
        table.add_row(
            manifest.name,
            manifest.license,
            f"{n_bytes / 1e6:.0f} MB",
            manifest.digest[:19] + "...",
            manifest.source,
        )
    Console().print(table)


@app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(help="As `fortpoint model list` names it.")],
    as_json: Json = False,
) -> None:
    """Delete a model's files."""
    from fortpoint.vault.model_folder import remove_model

    remove_model(configuration.load().home_path, name)
    if as_json:
        _print_json({"removed": name})
    else:
        typer.echo(f"removed {name}")


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.encode(value).decode())
