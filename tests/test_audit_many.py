"""Several gateways on one database: no lost, no doubled entry, no gap, no fork."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from sqlalchemy import make_url, select

from audit_world import entry
from fortpoint.audit.entry import unseal
from fortpoint.audit.log import AuditLog
from fortpoint.audit.signing_key import load_public
from fortpoint.audit.verify import verify
from fortpoint.store.database import Database
from fortpoint.store.tables import audit_entries

GATEWAY = """
import asyncio, sys
from pathlib import Path
from fortpoint.audit.entry import Entry, now
from fortpoint.audit.log import AuditLog
from fortpoint.store.database import Database

async def main(home, address, name):
    database = Database(address)
    log = await AuditLog.open(database, home)
    async def caller(number):
        for n in range(10):
            receipt = await log.append(Entry(time=now(), kind="answer", surface="/", status=200,
                request_id=f"{name}-{number}-{n}"))
            print(receipt.index, receipt.leaf_hash, f"{name}-{number}-{n}", flush=True)
    await asyncio.gather(*(caller(number) for number in range(20)))
    await log.close()
    await database.close()

asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


async def test_gateways_that_append_at_once_neither_lose_double_nor_fork(
    tmp_path: Path, database_address: str
) -> None:
    database = Database(database_address)
    await database.migrate()
    log = await AuditLog.open(database, tmp_path)
    await log.append(entry(0))
    processes = await asyncio.gather(
        *(
            asyncio.create_subprocess_exec(
                *(sys.executable, "-c", GATEWAY, str(tmp_path), database_address, str(number)),
                stdout=asyncio.subprocess.PIPE,
            )
            for number in range(3)
        )
    )
    said = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0, 0, 0]
    acknowledged = [line.split() for out, _ in said for line in out.decode().splitlines()]
    async with database.connect() as connection:
        rows = (await connection.execute(select(audit_entries))).all()
    stored = {row[0]: row for row in rows}
    assert len(acknowledged) == 600
    assert sorted(stored) == list(range(601))
    for index, leaf, request_id in acknowledged:
        row = stored[int(index)]
        assert row.leaf_hash.hex() == leaf
        assert unseal(row.entry).entry.request_id == request_id
    assert (await log.append(entry(1))).index == 601
    await log.close()
    await database.close()
    where = make_url(database_address) if "://" in database_address else Path(database_address)
    assert verify(where, load_public(tmp_path)).entries == 602
