"""A full disk: appends are refused, nothing is half written, and room brings the log back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from fortpoint.audit.entry import Entry, now
from fortpoint.audit.log import AuditLog, Receipt
from fortpoint.audit.signing_key import load_public
from fortpoint.audit.verify import verify
from fortpoint.errors import AuditUnavailable
from fortpoint.store.database import Database
from fortpoint.store.sqlite import Direct

ROOM = 1_000_000  # pages


class Limited:
    """A database whose file may have at most ``max_pages`` pages."""

    def __init__(self, home: Path) -> None:
        self.database = Database.in_home(home)
        self.max_pages = ROOM
        assert isinstance(self.database._short, Direct)
        for engine in (self.database._reading.sync_engine, self.database._short.engine):
            event.listen(engine, "begin", self._limit, insert=True)

    def _limit(self, connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {self.max_pages}")


def entry(number: int) -> Entry:
    return Entry(
        time=now(),
        kind="answer",
        request_id=f"req_{number}",
        surface="/v1/chat/completions",
        status=200,
        detail="x" * 2000,
    )


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[Limited]:
    limited = Limited(tmp_path)
    await limited.database.migrate()
    yield limited
    await limited.database.close()


async def test_disk_full_refuses_appends_and_room_brings_the_log_back(
    limited: Limited, tmp_path: Path
) -> None:
    log = await AuditLog.open(limited.database, tmp_path)
    limited.max_pages = 60
    outcomes: list[Receipt | AuditUnavailable] = []
    for number in range(100):
        try:
            outcomes.append(await log.append(entry(number)))
        except AuditUnavailable as error:
            outcomes.append(error)
    kept = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, AuditUnavailable)]
    assert 10 < len(kept) < 100
    assert "the disk is full" in refused[-1].message
    assert verify(tmp_path / "fortpoint.db", load_public(tmp_path)).entries == len(kept)

    limited.max_pages = ROOM
    receipts = await asyncio.gather(*(log.append(entry(number)) for number in range(50)))
    await log.close()
    assert sorted(receipt.index for receipt in receipts) == list(range(len(kept), len(kept) + 50))
    assert verify(tmp_path / "fortpoint.db", load_public(tmp_path)).entries == len(kept) + 50


async def test_batch_that_does_not_fit_is_refused_whole(limited: Limited, tmp_path: Path) -> None:
    log = await AuditLog.open(limited.database, tmp_path)
    await log.append(entry(0))
    limited.max_pages = 40
    # The first append is a batch of its own; the rest wait for it and are one batch together.
    outcomes = await asyncio.gather(
        *(log.append(entry(number)) for number in range(200)), return_exceptions=True
    )
    kept = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    assert sum(isinstance(outcome, AuditUnavailable) for outcome in outcomes) >= 199
    assert verify(tmp_path / "fortpoint.db", load_public(tmp_path)).entries == 1 + len(kept)
    await log.close()


FILE_SIZE_LIMITED = """
import asyncio, resource, sys
from pathlib import Path
from fortpoint.audit.entry import Entry, now
from fortpoint.audit.log import AuditLog
from fortpoint.audit.signing_key import load_public
from fortpoint.audit.verify import verify
from fortpoint.errors import AuditUnavailable
from fortpoint.store.database import Database

def limit(n_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

async def main(home):
    database = Database.in_home(home)
    await database.migrate()
    log = await AuditLog.open(database, home)
    limit(300_000)
    kept = refused = 0
    for number in range(150):
        try:
            receipt = await log.append(Entry(time=now(), kind="answer", request_id=str(number),
                surface="/", status=200, detail="x" * 4000))
            assert receipt.index == kept
            kept += 1
        except AuditUnavailable as error:
            refused += 1
            message = error.message
    assert kept > 5 and refused > 5, (kept, refused)
    limit(resource.RLIM_INFINITY)
    receipt = await log.append(
        Entry(time=now(), kind="admin", request_id="r", surface="/", status=200))
    await log.close()
    await database.close()
    report = verify(home / "fortpoint.db", load_public(home))
    assert report.entries == receipt.index + 1 >= kept + 1, (report, kept)
    print(message)

asyncio.run(main(Path(sys.argv[1])))
"""


def test_file_that_may_not_grow_refuses_appends_and_room_brings_the_log_back(
    tmp_path: Path,
) -> None:
    """The kernel itself refuses the write, in a process of its own (RLIMIT_FSIZE)."""
    finished = subprocess.run(
        [sys.executable, "-c", FILE_SIZE_LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("the record could not be written: the disk ")
