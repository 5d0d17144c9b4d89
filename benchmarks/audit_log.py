"""The audit log's figures: appends, proofs and verification on both databases, and ten kills.

    .venv/bin/python benchmarks/audit_log.py [--json] [--seconds 3] [--entries 1000000]
        [--postgresql ADDRESS] [--only append|proofs|faults] [--folder DIR]

append   callers append one entry after the other, as request handlers do; each append is on disk
         before it returns. The baseline writes entries with one transaction each and no tree.
proofs   a log of --entries entries: inclusion proofs of random entries, a consistency proof from
         a random size, the whole log verified by the product.
faults   a gateway under load is killed ten times (SIGKILL) at random moments, on PostgreSQL every
         second time the whole database server with all its processes. Whatever was answered
         must be in the log, at its place, and the log must verify.

--postgresql (or TEST_POSTGRESQL) is an address at which databases may be made; without it, and
always for faults, a server of its own is started with scripts/postgresql.sh.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, make_url, select, text

from fortpoint.audit.entry import Content, Entry, encode, new_request_id, new_salt, now
from fortpoint.audit.log import AuditLog
from fortpoint.audit.prover import Prover
from fortpoint.audit.signing_key import load_public
from fortpoint.audit.verify import verify
from fortpoint.store.database import Database
from fortpoint.store.postgresql import DRIVER
from fortpoint.store.tables import audit_entries
from fortpoint.types import Role, Score, Usage, Verdict

ROOT = Path(__file__).parent.parent
CALLERS = (1, 64, 256, 1024)
KILLS = 10
PROOFS = 500


def entry(number: int) -> Entry:
    """An entry as the gateway writes one: about 900 bytes."""
    scores = tuple(
        Score(name, 0.0123456, 0.9, Role.USER, False)
        for name in ("jailbreak", "injection", "harmful_request")
    )
    return Entry(
        time=now(),
        kind="answer",
        request_id=new_request_id("req"),
        surface="/v1/chat/completions",
        key_id="abcdefghijkl",
        user="benchmark",
        role="customer",
        model="smollm2-135m",
        model_digest="sha256:" + "ab" * 32,
        status=200,
        finish_reasons=("stop",),
        verdict=Verdict("allow", None, scores),
        usage=Usage(50, 120),
        request_sha256="cd" * 32,
        response_sha256="ef" * 32,
        detail=f"number {number}",
    )


# ---- append ----


async def append(address: str, home: Path, callers: int, seconds: float) -> dict[str, Any]:
    database = Database(address)
    await database.migrate()
    log = await AuditLog.open(database, home)
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        while (start := time.perf_counter()) < deadline:
            await log.append(entry(number), Content(new_salt()))
            latencies.append(time.perf_counter() - start)

    started = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    elapsed = time.perf_counter() - started
    await log.close()
    await database.close()
    verify(where(address), load_public(home))
    latencies.sort()
    return {
        "callers": callers,
        "appends_per_s": round(len(latencies) / elapsed),
        "p99_ms": round(latencies[int(len(latencies) * 0.99)] * 1000, 1),
    }


def baseline(folder: Path, seconds: float) -> int:
    connection = sqlite3.connect(folder / "baseline.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY, entry BLOB)")
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        connection.execute("INSERT INTO entries VALUES (?, ?)", (done, encode(entry(done))))
        done += 1
    connection.close()
    return round(done / seconds)


# ---- proofs ----


async def proofs(address: str, home: Path, entries: int) -> dict[str, Any]:
    database = Database(address)
    await database.migrate()
    log = await AuditLog.open(database, home)
    started = time.perf_counter()
    for start in range(0, entries, 1024):
        n = min(1024, entries - start)
        await asyncio.gather(*(log.append(entry(start + at)) for at in range(n)))
    filled_s = time.perf_counter() - started
    prover = Prover(database, log.verifier_key)
    choice = random.Random(0)
    inclusion, consistency = [], []
    for _ in range(PROOFS):
        start_s = time.perf_counter()
        await prover.inclusion(choice.randrange(entries))
        inclusion.append((time.perf_counter() - start_s) * 1000)
        start_s = time.perf_counter()
        await prover.consistency(choice.randrange(1, entries))
        consistency.append((time.perf_counter() - start_s) * 1000)
    await log.close()
    await database.close()
    started = time.perf_counter()
    report = verify(where(address), load_public(home))
    return {
        "entries": report.entries,
        "checkpoints": report.checkpoints,
        "filled_s": round(filled_s, 1),
        "inclusion_ms": _quantiles(inclusion),
        "consistency_ms": _quantiles(consistency),
        "verified_s": round(time.perf_counter() - started, 1),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    values.sort()
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: round(values[min(int(len(values) * q), len(values) - 1)], 2) for name, q in at.items()
    }


# ---- faults ----


class Server:
    """A PostgreSQL of its own, that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = self._script("start").strip()

    def kill(self) -> None:
        """Every process of the server at once, then a start that has to recover."""
        postmaster = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGSTOP)  # no child more
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        killed = [postmaster, *map(int, children)]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        while any(_runs(pid) for pid in killed):
            time.sleep(0.05)
        # Where nobody reaps it, a dead server looks to the next one as if it ran.
        (self.folder / "data" / "postmaster.pid").unlink()
        self._script("start", SERVER_PORT=str(make_url(self.address).port))

    def stop(self) -> None:
        try:
            self._script("stop")
        except SystemExit as error:  # what was measured is not lost with it
            print(error, file=sys.stderr)

    def _script(self, verb: str, **more: str) -> str:
        script = str(ROOT / "scripts" / "postgresql.sh")
        done = subprocess.run(
            [script, verb, str(self.folder)],
            env=os.environ | more,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"postgresql.sh {verb}: {done.stderr}")
        return done.stdout


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


GATEWAY = """
import asyncio, socket, sys
from pathlib import Path
import uvicorn
sys.path.insert(0, sys.argv[4])
from fakes import Bench
from fortpoint.access.keys import KeyRing
from fortpoint.audit.log import AuditLog
from fortpoint.gateway.app import create_app
from fortpoint.gateway.services import Services
from fortpoint.store.database import Database

async def main(home, address, port):
    database = Database(address)
    await database.migrate()
    log = await AuditLog.open(database, Path(home))
    bench = Bench()
    services = Services(bench.config, bench.engine, bench.guard, KeyRing(database), log)
    app = create_app(services)
    await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=int(port), ws="none",
        lifespan="off", log_config=None, access_log=False)).serve()

asyncio.run(main(*sys.argv[1:4]))
"""


class Gateway:
    """The whole HTTP edge, keys and log over the real database; the model is a fake."""

    def __init__(self, address: str, home: Path, port: int) -> None:
        self._command = [sys.executable, "-c", GATEWAY, str(home), address, str(port)]
        self._command.append(str(ROOT / "tests"))
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Load:
    """Callers that ask without end; remembers what was answered."""

    def __init__(self, port: int, key: str) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._stopping = False
        self.answered: dict[str, tuple[int, str]] = {}
        self.refused = self.cut_off = 0
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(32)]

    async def grow(self, n: int) -> None:
        """Until so many more were answered."""
        goal = len(self.answered) + n
        while len(self.answered) < goal:  # noqa: ASYNC110 - the callers are many and simple
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _ask(self) -> None:
        ask = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "hello"}]}
        async with httpx.AsyncClient(headers=self._headers, timeout=20) as client:
            while not self._stopping:
                try:
                    answer = await client.post(self._url, json=ask)
                except httpx.HTTPError:
                    self.cut_off += 1
                    await asyncio.sleep(0.05)
                    continue
                if answer.status_code != 200:
                    self.refused += 1
                    await asyncio.sleep(0.02)
                    continue
                note = answer.json()["fortpoint"]
                place = note["audit"]
                self.answered[note["request_id"]] = place["index"], place["leaf_hash"]


async def faults(server: Server | None, folder: Path, seed: int) -> dict[str, Any]:
    """``server`` is None for SQLite."""
    from fortpoint.access.keys import KeyRing

    choice = random.Random(seed)
    address = server.address if server else str(folder / "fortpoint.db")
    database = Database(address)
    await database.migrate()
    key = (await KeyRing(database).create("load", "customer")).secret
    port = _free_port()
    gateway = Gateway(address, folder, port)
    load = Load(port, key)
    kills = []
    for number in range(KILLS):
        await load.grow(50)  # it is under load again
        await asyncio.sleep(choice.uniform(0.05, 1.0))
        victim = "database" if server and number % 2 else "gateway"
        kills.append({"killed": victim, "answered_before": len(load.answered)})
        kill = server.kill if server and victim == "database" else gateway.kill
        await asyncio.to_thread(kill)
    await load.grow(50)
    await load.stop()
    gateway.stop()
    found = await compared(address, folder, database, load.answered)
    await database.close()
    return {"kills": kills, "refused": load.refused, "cut_off": load.cut_off, **found}


async def compared(
    address: str, folder: Path, database: Database, answered: dict[str, tuple[int, str]]
) -> dict[str, Any]:
    """What was answered beside what is in the log, which must verify."""
    report = verify(where(address), load_public(folder))
    async with database.connect() as connection:
        rows = (await connection.execute(select(audit_entries))).all()
    stored = {}
    for index, leaf, data in rows:
        stored[index] = leaf.hex(), json.loads(data)["entry"]["request_id"]
    missing = [
        request_id
        for request_id, (index, leaf) in answered.items()
        if stored.get(index) != (leaf, request_id)
    ]
    ids = [request_id for _, request_id in stored.values()]
    return {
        "answered": len(answered),
        "entries": report.entries,
        "answered_without_an_entry": len(missing),
        "doubled": len(ids) - len(set(ids)),
        "gaps": report.entries - len(stored),
        "verified": True,
    }


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# ---- the whole ----


def where(address: str) -> Any:
    return make_url(address) if "://" in address else Path(address)


@contextmanager
def fresh(address: str | None, folder: Path) -> Iterator[str]:
    """A new database: on the server at ``address``, or SQLite in ``folder``."""
    if address is None:
        yield str(folder / f"{secrets.token_hex(4)}.db")
        return
    name = f"bench_{secrets.token_hex(6)}"
    admin = create_engine(make_url(address).set(drivername=DRIVER), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(address).set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def measure(options: argparse.Namespace, folder: Path, server: Server | None) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine()}
    kinds = {"sqlite": None, "postgresql": options.postgresql or (server and server.address)}
    if options.only in {None, "append"}:
        found["baseline_appends_per_s"] = baseline(folder, options.seconds)
    for kind, address in kinds.items():
        part = found.setdefault(kind, {})
        if options.only in {None, "append"}:
            part["append"] = []
            for callers in CALLERS:
                home = folder / f"{kind}-{callers}"
                with fresh(address, folder) as one:
                    part["append"].append(asyncio.run(append(one, home, callers, options.seconds)))
        if options.only in {None, "proofs"}:
            with fresh(address, folder) as one:
                part["proofs"] = asyncio.run(proofs(one, folder / kind, options.entries))
        if options.only in {None, "faults"}:
            (folder / f"{kind}-faults").mkdir()
            own = Server(folder / "faults-server") if kind == "postgresql" else None
            try:
                part["faults"] = asyncio.run(faults(own, folder / f"{kind}-faults", 1))
            finally:
                if own:
                    own.stop()
    return found


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "commit": commit or "unknown",
    }


def show(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if name not in {"sqlite", "postgresql"}:
            print(f"{name:24}{value}")
    for kind in ("sqlite", "postgresql"):
        part = found[kind]
        for row in part.get("append", ()):
            print(
                f"{kind:12}append   {row['callers']:5} callers {row['appends_per_s']:7} a second"
                f"   p99 {row['p99_ms']:7} ms"
            )
        if made := part.get("proofs"):
            print(f"{kind:12}proofs   {made}")
        if broken := part.get("faults"):
            for number, kill in enumerate(broken.pop("kills"), start=1):
                print(f"{kind:12}kill {number:2}  {kill['killed']:9} at {kill['answered_before']}")
            print(f"{kind:12}faults   {broken}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--postgresql", default=os.environ.get("TEST_POSTGRESQL") or None)
    parser.add_argument("--only", choices=("append", "proofs", "faults"))
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        folder.chmod(0o711)  # the server's user passes through
        needed = options.postgresql is None and options.only != "faults"
        server = Server(folder / "server") if needed else None
        try:
            found = measure(options, folder, server)
        finally:
            if server:
                server.stop()
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
