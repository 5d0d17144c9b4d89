"""How many appends a second the audit log takes, each durable before it returns.

    .venv/bin/python benchmarks/audit_append.py [--seconds 3] [--folder DIR]

Callers append one entry after the other, as request handlers do; only their number changes.
The baseline writes the same entries with one transaction each and no tree: what the disk
gives without group commit. Put --folder on the disk that will hold the database.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

from fortpoint.audit.checkpoint import VerifierKey
from fortpoint.audit.entry import Entry, encode, now
from fortpoint.audit.log import AuditLog
from fortpoint.audit.verify import verify
from fortpoint.store.database import Database
from fortpoint.types import Role, Score, Usage, Verdict

CALLERS = (1, 8, 64, 256, 1024)


def entry(number: int) -> Entry:
    """An entry as the gateway writes one: about 800 bytes."""
    scores = tuple(
        Score(name, 0.0123456, 0.9, Role.USER, False)
        for name in ("jailbreak", "injection", "harmful_request")
    )
    return Entry(
        time=now(),
        kind="answer",
        request_id=f"req_{number:024x}",
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
    )


async def appends_per_second(home: Path, callers: int, seconds: float) -> tuple[float, float, int]:
    """Appends a second, the slowest percentile's latency in seconds, entries per checkpoint."""
    database = Database.in_home(home)
    await database.migrate()
    log = await AuditLog.open(database, home)
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        while (start := time.perf_counter()) < deadline:
            await log.append(entry(number))
            latencies.append(time.perf_counter() - start)

    started = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    elapsed = time.perf_counter() - started
    await log.close()
    await database.close()
    report = check(home, log.verifier_key)
    latencies.sort()
    p99 = latencies[int(len(latencies) * 0.99)]
    return len(latencies) / elapsed, p99, round(report[0] / report[1])


def check(home: Path, key: VerifierKey) -> tuple[int, int, float]:
    start = time.perf_counter()
    report = verify(home / "fortpoint.db", key)
    return report.entries, report.checkpoints, time.perf_counter() - start


def baseline(folder: Path, seconds: float) -> float:
    connection = sqlite3.connect(folder / "baseline.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY, entry BLOB)")
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        connection.execute("INSERT INTO entries VALUES (?, ?)", (done, encode(entry(done))))
        done += 1
    connection.close()
    return done / seconds


def describe() -> str:
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
        cwd=Path(__file__).parent,
    ).stdout.strip()
    load = os.getloadavg()[0]
    return (
        f"hardware  {cpu}, {os.cpu_count()} cores, load {load:.1f} at the start\n"
        f"software  Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}\n"
        f"commit    {commit or 'unknown'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    print(describe())
    print(f"entry     {len(encode(entry(1)))} bytes\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rate = baseline(Path(folder), arguments.seconds)
        print(f"one transaction each, no tree     {rate:8.0f} appends/s")
        for callers in CALLERS:
            home = Path(folder) / str(callers)
            rate, p99, batch = asyncio.run(appends_per_second(home, callers, arguments.seconds))
            print(
                f"audit log, {callers:5d} callers        {rate:8.0f} appends/s"
                f"   p99 {p99 * 1000:7.1f} ms   {batch:5d} entries a checkpoint"
            )
        key = VerifierKey.parse((home / "keys" / "audit.pub").read_text(encoding="utf-8"))
        entries, checkpoints, elapsed = check(home, key)
        print(
            f"\nverify    {entries / elapsed:8.0f} entries/s"
            f" ({entries} entries, {checkpoints} checkpoints)"
        )


if __name__ == "__main__":
    main()
