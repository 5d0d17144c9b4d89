"""``fortpoint vault trace``: whose copy a found checkpoint was made from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fortpoint import config as configuration
from fortpoint.cli.progress import Progress
from fortpoint.cli.vault_home import key_encryption, print_json, record
from fortpoint.errors import ModelError

if TYPE_CHECKING:
    from fortpoint.config import Config
    from fortpoint.vault.key_encryption import KeyEncryption
    from fortpoint.vault.leases import Lease
    from fortpoint.vault.tensor_files import TensorFiles
    from fortpoint.vault.trace import Trace

_MOST_SHOWN = 10


def trace(
    suspect: Annotated[
        Path, typer.Argument(exists=True, help="Safetensors (a file or folder) or a .gguf file.")
    ],
    model: Annotated[str, typer.Option("--model", help="The sealed model it may come from.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A LoRA folder to merge into it first.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Where to write the report, in Markdown.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a suspect with every lease of a model; name the ones it was made from."""
    from fortpoint.vault import atomic_file, mark_master
    from fortpoint.vault.align import Geometry
    from fortpoint.vault.leases import FileLeases, is_committed, mark_key
    from fortpoint.vault.suspect import open_suspect
    from fortpoint.vault.trace import collect, identify
    from fortpoint.vault.trace_report import markdown

    config = configuration.load()
    kek = key_encryption(config)
    master = mark_master.load(config.home_path, kek)
    opened = open_suspect(suspect, adapter)
    with Progress() as progress, _base(config, model, kek) as (base, digest, geometry):
        own = [
            lease for lease in FileLeases(config.home_path).all() if lease.terms.digest == digest
        ]
        keys = {lease.id: mark_key(master, digest, lease.id) for lease in own}
        leases = {lease.id: lease for lease in own if is_committed(lease, keys[lease.id])}
        if not leases:
            raise ModelError(f"{model} has no leases that a suspect could come from")
        evidence = collect(opened, base, Geometry(*geometry), progress.update)
        committed = {lease_id: keys[lease_id] for lease_id in leases}
        result = identify(evidence, committed, progress.update)
    sha256 = _sha256(suspect)
    found = ", ".join(finding.lease for finding in result.identified) or "none"
    record(config, "cli vault trace", f"suspect sha256 {sha256}: {found}", digest)
    if report is not None:
        uncounted = len(own) - len(leases)
        text = markdown(result, leases, model, sha256, int(time.time()), uncounted)
        atomic_file.replace(report.absolute(), text.encode())
    if as_json:
        print_json(msgspec.to_builtins(result) | {"suspect_sha256": sha256, "digest": digest})
    else:
        _show(result, leases)
        typer.echo(f"Report: {report}" if report else "Write it out with --report FILE.md.")


@contextmanager
def _base(
    config: Config, name: str, kek: KeyEncryption
) -> Iterator[tuple[TensorFiles, str, tuple[int, int, int]]]:
    """The unmarked weights, their digest, and the heads' numbers."""
    from fortpoint.vault.open_sealed import SealedCheckpoint, SealedModel
    from fortpoint.vault.sealed_folder import sealed_path

    with SealedModel.open(sealed_path(config.home_path, name), kek) as sealed:
        heads = _heads(sealed.read_file("config.json"))
        yield SealedCheckpoint(sealed), sealed.manifest.digest, heads


def _heads(raw: bytes) -> tuple[int, int, int]:
    """Heads, key-value heads and a head's width, of a ``config.json``."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, object])
        heads = fields["num_attention_heads"]
        kv_heads = fields.get("num_key_value_heads") or heads
        numbers = msgspec.convert([heads, kv_heads, fields["hidden_size"]], tuple[int, int, int])
        width = fields.get("head_dim") or numbers[2] // numbers[0]
        return numbers[0], numbers[1], msgspec.convert(width, int)
    except (msgspec.MsgspecError, KeyError, ZeroDivisionError, RecursionError):
        raise ModelError("the model's config.json does not say what its heads are") from None


def _sha256(suspect: Path) -> str:
    """Of a file, or of a folder's files by name."""
    from fortpoint.vault.model_folder import sha256_of

    if suspect.is_file():
        return sha256_of(suspect)
    digest = hashlib.sha256()
    for file in sorted(path for path in suspect.iterdir() if path.is_file()):
        digest.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _show(result: Trace, leases: dict[str, Lease]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("lease", "holder", "T", "p, counting all", "verdict")
    for finding in result.findings[:_MOST_SHOWN]:
        verdict = "IDENTIFIED" if finding.identified else "-"
        holder = Text(_printable(leases[finding.lease].terms.holder))
        p = f"{finding.corrected_p:.1e}"
        table.add_row(finding.lease, holder, f"{finding.statistic:.2f}", p, verdict)
    Console().print(table)
    typer.echo(
        f"{result.n_leases} leases over {result.n_weights} weights; "
        f"identified above T = {result.threshold:.2f} (one error in a billion, over all)"
    )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
