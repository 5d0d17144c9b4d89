"""``fortpoint vault``: seal weights, open them on a lease, wrap their keys anew.

Every act is recorded in the audit log before it is reported.
"""

from __future__ import annotations

import socket
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fortpoint import config as configuration
from fortpoint.cli import vault_lease
from fortpoint.cli.progress import Progress
from fortpoint.cli.vault_home import digest_of, key_encryption, print_json, record
from fortpoint.cli.vault_trace import trace
from fortpoint.errors import ConfigError, LeaseRefused

if TYPE_CHECKING:
    from fortpoint.config import Config
    from fortpoint.vault.leases import Lease
    from fortpoint.vault.open_sealed import SealedModel

app = typer.Typer(help="Seal weights, lease marked copies, trace leaks.", no_args_is_help=True)
app.add_typer(vault_lease.app, name="lease")
app.command("trace")(trace)

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
    kek = key_encryption(config)
    with Progress() as progress:
        home = config.home_path
        folder = seal_model(
            model_path(home, name), home, kek, lambda done, n: progress.update("seal", done, n)
        )
        with SealedModel.open(folder, kek) as model:  # before the plain files may go
            model.verify(lambda done, n: progress.update("verify", done, n))
            manifest = model.manifest
    record(config, "cli vault seal", f"model {name} under {kek.kind}", manifest.digest)
    if remove_plain:
        remove_model(home, name)
    if as_json:
        print_json({"name": name, "digest": manifest.digest, "plain_removed": remove_plain})
    else:
        typer.echo(f"sealed {name}  {manifest.digest}")
        if not remove_plain:
            typer.echo(f"The plain files are still here: `fortpoint model rm {name}` removes them.")


@app.command("open")
def open_model(
    name: Name,
    lease: Annotated[
        str | None, typer.Option("--lease", help="Release it on this lease: checked and counted.")
    ] = None,
    plain_export: Annotated[
        Path | None,
        typer.Option(
            "--plain-export",
            help="Write a copy marked for the lease; needs --lease and vault.plain_export.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Open a sealed model in memory and authenticate every byte; nothing is written."""
    from fortpoint.vault.leases import FileLeases
    from fortpoint.vault.open_sealed import SealedModel
    from fortpoint.vault.sealed_folder import sealed_path

    config = configuration.load()
    if plain_export is not None and (lease is None or not config.vault.plain_export):
        raise ConfigError("--plain-export needs --lease, and vault.plain_export set to true")
    held = _released(config, name, lease) if lease else None
    store = FileLeases(config.home_path)
    with (
        Progress() as progress,
        store.hold(held.id) if held else nullcontext(),
        SealedModel.open(sealed_path(config.home_path, name), key_encryption(config)) as model,
    ):
        model.verify(lambda done, n: progress.update("verify", done, n))
        manifest, n_bytes, files = model.manifest, model.n_bytes, model.names
        how = f" on {held.id}" if held else ""
        record(config, "cli vault open", f"model {name}{how}, verified", manifest.digest)
        if held:
            store.update(msgspec.structs.replace(held, releases=held.releases + 1))
        if held and plain_export:
            _export(config, model, held, plain_export)
    if as_json:
        print_json({"name": name, "digest": manifest.digest, "bytes": n_bytes, "files": files})
    else:
        typer.echo(f"{name}  {manifest.digest}\nEvery byte of {len(files)} files is as sealed.")


def _released(config: Config, name: str, lease_id: str) -> Lease:
    """The lease, if it is good for this model here and now; a refusal is recorded."""
    from fortpoint.vault.leases import FileLeases, check

    digest = digest_of(config, name)
    try:
        lease = FileLeases(config.home_path).get(lease_id)
        check(lease, digest, socket.gethostname(), int(time.time()))
    except LeaseRefused as error:
        record(config, "cli vault open", f"model {name} refused: {error.message}", digest)
        raise
    return lease


def _export(config: Config, model: SealedModel, lease: Lease, target: Path) -> None:
    from fortpoint.vault import mark_master
    from fortpoint.vault.export import export
    from fortpoint.vault.leases import is_committed, mark_key

    key = mark_key(
        mark_master.load(config.home_path, key_encryption(config)), model.manifest.digest, lease.id
    )
    if not is_committed(lease, key):
        raise LeaseRefused(f"{lease.id} was not made with this home's secret of marks")
    record(config, "cli vault export", f"plain copy on {lease.id}", model.manifest.digest)
    export(model, key, target.absolute(), lease.epsilon)


@app.command()
def rotate(
    name: Name,
    old: Annotated[str, typer.Option("--from", help="What wraps the key now, as in vault.key.")],
    as_json: Json = False,
) -> None:
    """Wrap a model's key with what vault.key names now; the weights stay as they are."""
    from fortpoint.vault import key_sources, mark_master
    from fortpoint.vault.sealed_folder import rotate as rewrap
    from fortpoint.vault.sealed_folder import sealed_path

    config = configuration.load()
    folder, kek = sealed_path(config.home_path, name), key_encryption(config)
    before = key_sources.key_encryption(old, config.vault.transit_token)
    mark_master.rotate(config.home_path, before, kek)
    rewrap(folder, before, kek)
    record(config, "cli vault rotate", f"model {name} to {kek.kind}", digest_of(config, name))
    if as_json:
        print_json({"name": name, "key": kek.kind})
    else:
        typer.echo(f"{name} opens with {kek.kind} now, and with nothing else.")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """Name the sealed models."""
    from fortpoint.vault.sealed_folder import list_sealed

    models = list(list_sealed(configuration.load().home_path))
    if as_json:
        print_json([{"name": model.name, "digest": model.digest} for model in models])
    for model in () if as_json else models:
        typer.echo(f"{model.name}  {model.digest}")
    if not models and not as_json:
        typer.echo("nothing is sealed; `fortpoint vault seal NAME` seals a model")
