"""``fortpoint doctor``: what this machine gives the product, and what to do about the rest.

It changes nothing. A line is ``ok``, ``warn`` (works, but worse than it could), ``off`` (a
protection or a process that is not there) or ``broken`` (the product cannot run so); only
``broken`` makes the exit code 1. The protections of a running engine are the ones that the
engine measured in itself.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fortpoint import config as configuration
from fortpoint import hardening
from fortpoint.engine.client import EngineClient
from fortpoint.engine.protocol import Description
from fortpoint.errors import EngineError

_GIB = 1024**3
_MIN_PYTHON = (3, 11)
_WANTED_MEMORY_BYTES = 3 * _GIB // 2
_WANTED_DISK_BYTES = 2 * _GIB
_MIN_DISK_BYTES = 64 * 1024**2
_COLOURS = {"ok": "green", "warn": "yellow", "off": "yellow", "broken": "red"}

State = Literal["ok", "warn", "off", "broken"]


class Check(msgspec.Struct, frozen=True):
    """One line. ``next`` says what to do; None where nothing is to be done."""

    name: str
    state: State
    finding: str
    next: str | None = None


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine, the home folder and the running engine's protections."""
    checks = tuple(examine(configuration.load().home_path))
    if as_json:
        typer.echo(msgspec.json.encode({"checks": checks}).decode())
    else:
        Console().print(_table(checks))
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)


def examine(home: Path) -> Iterator[Check]:
    """Every check in the order it is shown. ``home`` need not exist."""
    yield check_python()
    yield check_platform()
    yield check_cores()
    yield check_memory()
    yield check_disk(home)
    yield check_home(home)
    yield from check_compute()
    yield check_landlock()
    yield check_seccomp()
    yield from check_engine(home)


def check_python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] >= _MIN_PYTHON:
        return Check("python", "ok", version)
    return Check("python", "broken", version, "install Python 3.11 or newer")


def check_platform() -> Check:
    name = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() == "Linux":
        return Check("platform", "ok", name)
    return Check("platform", "warn", name, "run on Linux: elsewhere the engine has no sandbox")


def check_cores() -> Check:
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if n_cores and n_cores > 1:
        return Check("cores", "ok", str(n_cores))
    return Check("cores", "warn", str(n_cores or "unknown"), "give it two cores or more")


def check_memory() -> Check:
    """Free memory; Linux counts what caches would give back."""
    n_bytes = _available_memory()
    if n_bytes is None:
        return Check("memory", "warn", "unknown", "make sure that 1.5 GiB are free")
    finding = f"{n_bytes / _GIB:.1f} GiB free"
    if n_bytes >= _WANTED_MEMORY_BYTES:
        return Check("memory", "ok", finding)
    return Check("memory", "warn", finding, "free 1.5 GiB, or lower engine.kv_cache_mib")


def check_disk(home: Path) -> Check:
    folder = next(path for path in (home, *home.parents) if path.exists())
    n_free = shutil.disk_usage(folder).free
    finding = f"{n_free / _GIB:.1f} GiB free for {home}"
    if n_free < _MIN_DISK_BYTES:
        return Check("disk", "broken", finding, "free space: answers stop when the record is full")
    if n_free < _WANTED_DISK_BYTES:
        return Check("disk", "warn", finding, "free 2 GiB before you pull a model")
    return Check("disk", "ok", finding)


def check_home(home: Path) -> Check:
    """It holds keys, weights and the record: its owner's alone."""
    try:
        status = home.stat()
    except FileNotFoundError:
        return Check("home", "off", f"{home} is not there yet", "start with `make serve`")
    except OSError as error:
        return Check("home", "broken", f"{home}: {error.strerror}", "set FORTPOINT_HOME elsewhere")
    mode = stat.S_IMODE(status.st_mode)
    finding = f"{home} mode {mode:04o}"
    if not stat.S_ISDIR(status.st_mode) or not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        return Check("home", "broken", finding, "make it a folder that you can write")
    if status.st_uid != os.geteuid():
        return Check("home", "warn", f"{finding}, owned by another user", "run as its owner")
    if mode & 0o077:
        return Check("home", "warn", f"{finding}, open to other users", f"chmod 700 {home}")
    return Check("home", "ok", finding)


def check_compute() -> Iterator[Check]:
    """Torch, and the precision that ``engine.dtype=auto`` would take here."""
    try:
        import torch

        from fortpoint.engine import precision
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        yield Check("torch", "broken", reason, "install again: remove .venv, then `make serve`")
        return
    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    found = precision.Precision("auto", precision.measure())
    for i, rows in enumerate(precision.ROWS):
        times = {kind: seconds[i] for kind, seconds in found.seconds.items()}
        listed = ", ".join(f"{kind} {took_s * 1e3:.2f} ms" for kind, took_s in times.items())
        finding = f"{listed}: {min(times, key=times.__getitem__)}"
        yield Check(f"precision at {rows} rows", "ok", finding)
    order = ", then ".join(found.by_speed())
    yield Check("precision", "ok", f"{order}: auto takes the first that keeps a matrix's values")


def check_landlock() -> Check:
    """What the kernel offers; whether the engine uses it is the engine's own line."""
    abi = hardening.landlock_abi()
    if abi >= 4:
        return Check("landlock", "ok", f"ABI {abi}")
    if abi > 0:
        return Check("landlock", "warn", f"ABI {abi}: files only", "Linux 6.7 confines TCP too")
    return Check(
        "landlock", "off", "not in this kernel", "use Linux 5.13 or newer with lsm=landlock"
    )


def check_seccomp() -> Check:
    if hardening.seccomp_available():
        return Check("seccomp", "ok", f"filters for {platform.machine()}")
    return Check("seccomp", "off", "not here", "use Linux on x86_64 or aarch64")


def check_engine(home: Path) -> Iterator[Check]:
    """The running engine and each of its protections, as it measured them itself."""
    try:
        engine = asyncio.run(_describe(home / "run" / "engine.sock"))
    except EngineError:
        yield Check("engine", "off", f"none runs on {home}", "start it with `make serve`")
        return
    yield Check("engine", "ok", f"{engine.model} in {engine.dtype}, process {engine.pid}")
    for name, is_on in engine.protections.items():
        yield (
            Check(f"engine {name}", "ok", "on")
            if is_on
            else Check(f"engine {name}", "off", "off", _REMEDIES.get(name, "restart the engine"))
        )


_REMEDIES = {
    "landlock": "use a kernel with Landlock; engine.sandbox=require refuses to run without",
    "seccomp": "use Linux on x86_64 or aarch64; engine.sandbox=require refuses to run without",
    "no_network": "use a platform with seccomp, or a container without a network",
    "no_outbound": "use a platform with seccomp, or a container without a network",
}


async def _describe(socket_path: Path) -> Description:
    client = EngineClient(socket_path)
    try:
        return await client.describe()
    finally:
        await client.close()


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _table(checks: tuple[Check, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("check", "state", "finding", "next"):
        table.add_column(column, overflow="fold")
    for check in checks:
        colour = _COLOURS[check.state]
        state = f"[{colour}]{check.state}[/{colour}]"
        table.add_row(check.name, state, _plain(check.finding), _plain(check.next or ""))
    return table


def _plain(text: str) -> str:
    """Paths may hold brackets, which rich would read as markup."""
    return text.replace("[", r"\[")
