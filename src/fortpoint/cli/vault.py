"""``fortpoint vault``: seal weights, open them, wrap their keys anew.

Every act is recorded in the audit log before it is reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fortpoint import config as configuration
from fortpoint.cli.progress import Progress
from fortpoint.errors import ConfigError

if TYPE_CHECKING:
    from fortpoint.config import Config
    from fortpoint.vault.key_encryption import KeyEncryption

app = typer.Typer(help="Seal weights, and open them.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="The model, as `fortpoint model list` names it.")]


@app.command()
def seal(
    name: Name,
    remove_plain: Annotated[
        bool, typer.Option("--remove-plain", help="Delete the plain files once they are sealed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Encrypt a model's files under a key of its own, wrapped by what vault.key names."""
    from fortpoint.vault.model_folder import model_path, remove_model
    from fortpoint.vault.open_sealed import SealedModel
    from fortpoint.vault.seal import seal_model

    config = configuration.load()
    kek = _kek(config)
    with Progress() as progress:
        home = config.home_path
        folder = seal_model(
            model_path(home, name), home, kek, lambda done, n: progress.update("seal", done, n)
        )
        with SealedModel.open(folder, kek) as model:  # before the plain files may go
            model.verify(lambda done, n: progress.update("verify", done, n))
            manifest = model.manifest
    _record(config, "cli vault seal", f"model {name} under {kek.kind}", manifest.digest)
    if remove_plain:
        remove_model(home, name)
    if as_json:
        _print({"name": name, "digest": manifest.digest, "plain_removed": remove_plain})
    else:
        typer.echo(f"sealed {name}  {manifest.digest}")
        if not remove_plain:
            typer.echo(f"The plain files are still here: `fortpoint model rm {name}` removes them.")


@app.command("open")
def open_model(name: Name, as_json: Json = False) -> None:
    """Open a sealed model in memory and authenticate every byte; nothing is written."""
    from fortpoint.vault.open_sealed import SealedModel
    from fortpoint.vault.sealed_folder import sealed_path

    config = configuration.load()
    with (
        Progress() as progress,
        SealedModel.open(sealed_path(config.home_path, name), _kek(config)) as model,
    ):
        model.verify(lambda done, n: progress.update("verify", done, n))
        manifest, n_bytes, files = model.manifest, model.n_bytes, model.names
    _record(config, "cli vault open", f"model {name} verified", manifest.digest)
    if as_json:
        _print({"name": name, "digest": manifest.digest, "bytes": n_bytes, "files": files})
    else:
        typer.echo(f"{name}  {manifest.digest}\nEvery byte of {len(files)} files is as sealed.")


@app.command()
def rotate(
    name: Name,
    old: Annotated[str, typer.Option("--from", help="What wraps the key now, as in vault.key.")],
    as_json: Json = False,
) -> None:
    """Wrap a model's key with what vault.key names now; the weights stay as they are."""
    from fortpoint.vault.key_sources import key_encryption
    from fortpoint.vault.sealed_folder import KeyRecord, sealed_path
    from fortpoint.vault.sealed_folder import rotate as rewrap

    config = configuration.load()
    folder, kek = sealed_path(config.home_path, name), _kek(config)
    rewrap(folder, key_encryption(old, config.vault.transit_token), kek)
    _record(config, "cli vault rotate", f"model {name} to {kek.kind}", KeyRecord.read(folder).model)
    if as_json:
        _print({"name": name, "key": kek.kind})
    else:
        typer.echo(f"{name} opens with {kek.kind} now, and with nothing else.")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Name the sealed models."""
    from fortpoint.vault.sealed_folder import list_sealed

    models = list(list_sealed(configuration.load().home_path))
    if as_json:
        _print([{"name": model.name, "digest": model.digest} for model in models])
    for model in () if as_json else models:
        typer.echo(f"{model.name}  {model.digest}")
    if not models and not as_json:
        typer.echo("nothing is sealed; `fortpoint vault seal NAME` seals a model")


def _kek(config: Config) -> KeyEncryption:
    from fortpoint.vault.key_sources import key_encryption

    if not config.vault.key:
        raise ConfigError(
            "vault.key is not set: name a passphrase file, the keyring or a key server, such as "
            "FORTPOINT_VAULT__KEY=passphrase-file:/path"
        )
    return key_encryption(config.vault.key, config.vault.transit_token)


def _record(config: Config, surface: str, detail: str, digest: str) -> None:
    import asyncio

    from fortpoint.cli import record
    from fortpoint.home import Home

    Home(config.home_path).make()

    async def append() -> None:
        async with record.opened(config.state_path) as (_, log):
            await record.append(log, surface, detail, model_digest=digest)

    asyncio.run(append())


def _print(value: object) -> None:
    typer.echo(msgspec.json.encode(value).decode())
