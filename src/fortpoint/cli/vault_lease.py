"""``fortpoint vault lease``: for whom a marked copy is, where, and until when.

A lease's commitment is in the audit log before the lease exists; so is its revocation.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fortpoint import config as configuration
from fortpoint.cli.vault_home import digest_of, key_encryption, print_json, record

if TYPE_CHECKING:
    from fortpoint.config import Config
    from fortpoint.vault.leases import Lease

app = typer.Typer(help="Issue, list and revoke leases.", no_args_is_help=True)

_HOUR_S = 3600

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _AuditLog:
    """The audit log as the place of commitments."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def commit(self, lease: Lease) -> None:
        terms = lease.terms
        detail = (
            f"{lease.id} of {terms.model} for {terms.holder} on {terms.host} until "
            f"{terms.expires_at}, mark key sha256 {lease.commitment}"
        )
        record(self._config, "cli vault lease issue", detail, terms.digest)


@app.command()
def issue(
    name: Annotated[str, typer.Argument(help="The sealed model.")],
    holder: Annotated[str, typer.Option("--holder", help="Who gets the copy.")],
    host: Annotated[str | None, typer.Option("--host", help="Its host; this one's name.")] = None,
    hours: Annotated[int, typer.Option("--hours", min=1, max=87_600, help="How long.")] = 720,
    as_json: Json = False,
) -> None:
    """Make a lease; its mark's key is committed to the audit log first."""
    import socket

    from fortpoint.vault import mark_master
    from fortpoint.vault.leases import FileLeases, Terms
    from fortpoint.vault.leases import issue as issue_lease

    config = configuration.load()
    now = int(time.time())
    terms = Terms(
        name,
        digest_of(config, name),
        holder,
        host or socket.gethostname(),
        now,
        now + hours * _HOUR_S,
    )
    master = mark_master.load_or_create(config.home_path, key_encryption(config))
    lease = issue_lease(FileLeases(config.home_path), _AuditLog(config), master, terms)
    if as_json:
        print_json(msgspec.to_builtins(lease))
    else:
        typer.echo(f"{lease.id}  {name} for {holder} on {terms.host}, {hours} hours")


@app.command("list")
def list_leases(as_json: Json = False) -> None:
    """Name every lease."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fortpoint.vault.leases import FileLeases

    leases = FileLeases(configuration.load().home_path).all()
    if as_json:
        print_json([msgspec.to_builtins(lease) for lease in leases])
        return
    table = Table("lease", "model", "holder", "host", "state", "releases")
    for lease in leases:
        terms = lease.terms
        cells = (lease.id, terms.model, terms.holder, terms.host, _state(lease))
        table.add_row(*map(Text, cells), str(lease.releases))
    Console().print(table)


@app.command()
def revoke(
    lease_id: Annotated[str, typer.Argument(help="As `fortpoint vault lease list` names it.")],
    as_json: Json = False,
) -> None:
    """Refuse further releases; what is out already stays out, and stays traceable."""
    from fortpoint.vault.leases import FileLeases

    config = configuration.load()
    store = FileLeases(config.home_path)
    lease = msgspec.structs.replace(store.get(lease_id), revoked_at=int(time.time()))
    record(config, "cli vault lease revoke", lease.id, lease.terms.digest)
    store.update(lease)
    if as_json:
        print_json({"lease": lease.id, "revoked": True})
    else:
        typer.echo(f"revoked {lease.id}")


def _state(lease: Lease) -> str:
    if lease.revoked_at is not None:
        return "revoked"
    return "ended" if lease.terms.expires_at <= time.time() else "valid"
