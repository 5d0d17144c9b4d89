"""The append-only log: an append returns when its entry is on disk and under a signed root.

    log = await AuditLog.open(database, home)
    receipt = await log.append(Entry(time=now(), kind="answer", ...))
    receipt.index, receipt.leaf_hash

Group commit: while one batch is being committed, further appends wait together and form the
next. A batch is one transaction with its entries and one signed checkpoint over all of the
log, so that it is there whole or not at all.

The log fails closed. Where a batch cannot be committed, every append in it raises
``AuditUnavailable`` and the caller must not send its answer. The next batch tries again, so
that the log works as soon as the disk does. An append that failed was almost always not
kept; it may have been where the disk reported an error after it had already written. What
was acknowledged is never missing.

Several processes may append to one database. Each batch reads the log's head inside its own
write transaction; a head that another process moved is taken only with that process's valid
signature. Two heads cannot fork: the index is the primary key.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, func, insert, select

from fortpoint.audit import signing_key
from fortpoint.audit.checkpoint import Signer, VerifierKey
from fortpoint.audit.entry import Entry, encode, seal
from fortpoint.audit.merkle import Frontier, leaf_hash
from fortpoint.errors import AuditUnavailable, FortPointError, VerificationError
from fortpoint.store.database import Database
from fortpoint.store.tables import audit_checkpoints, audit_entries

MAX_BATCH_ENTRIES = 1024
MAX_BATCH_BYTES = 8 * 1024 * 1024
MAX_WAITING_ENTRIES = 16_384

# Built once: each batch of each request waits for them.
_INSERT_ENTRIES = insert(audit_entries)
_INSERT_CHECKPOINT = insert(audit_checkpoints)
_NEWEST_INDEX = select(func.max(audit_entries.c.index)).scalar_subquery()
_NEWEST = (
    select(audit_checkpoints, _NEWEST_INDEX.label("newest_index"))
    .order_by(audit_checkpoints.c.size.desc())
    .limit(1)
)

_logger = logging.getLogger(__name__)


class Receipt(msgspec.Struct, frozen=True):
    """Where an entry is, and the hexadecimal leaf hash that it is bound by."""

    index: int
    leaf_hash: str


@dataclass(frozen=True, slots=True)
class _Waiting:
    body: bytes
    receipt: asyncio.Future[Receipt]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Where it began, its leaves, the tree after it."""

    start: int
    leaves: list[bytes]
    after: Frontier


class AuditLog:
    """The log of one home, for one event loop. Use ``open``."""

    def __init__(self, database: Database, signer: Signer, frontier: Frontier) -> None:
        self._database = database
        self._signer = signer
        self._frontier = frontier
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._writer = asyncio.create_task(self._write(), name="audit log")

    @classmethod
    async def open(cls, database: Database, home: Path) -> AuditLog:
        """Open the log, with a new key pair where it has no entries yet.

        Raises ``AuditUnavailable`` where the log's newest checkpoint does not verify, does not
        cover all entries, or the key is missing: appending to a damaged record would bury it.
        """
        try:
            async with database.connect() as connection:
                empty = await connection.run_sync(_is_empty)
                signer = signing_key.load_or_create(home, may_create=empty)
                frontier = await connection.run_sync(_head, signer.verifier, Frontier())
        except AuditUnavailable:
            raise
        except FortPointError as error:
            raise AuditUnavailable(f"the record cannot be opened: {error.message}") from error
        return cls(database, signer, frontier)

    @property
    def verifier_key(self) -> VerifierKey:
        return self._signer.verifier

    async def append(self, entry: Entry) -> Receipt:
        """Record ``entry``; returns once it is durable. Raises ``AuditUnavailable``.

        A caller that is cancelled while waiting leaves the entry in the queue.
        """
        body = encode(entry)
        if self._closing or self._writer.done():
            raise AuditUnavailable("the record is closed")
        if len(self._waiting) >= MAX_WAITING_ENTRIES:
            raise AuditUnavailable("the record cannot keep up; try again")
        receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(body, receipt))
        self._wake.set()
        return await receipt

    async def close(self) -> None:
        """Write what is waiting and stop. Later appends raise ``AuditUnavailable``."""
        self._closing = True
        self._wake.set()
        await asyncio.shield(self._writer)

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := self._next_batch():
                await self._settle(batch)
            if self._closing:
                return

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        n_bytes = 0
        while self._waiting and len(batch) < MAX_BATCH_ENTRIES and n_bytes < MAX_BATCH_BYTES:
            batch.append(self._waiting.popleft())
            n_bytes += len(batch[-1].body)
        return batch

    async def _settle(self, batch: list[_Waiting]) -> None:
        """Commit the batch and tell every caller, whatever happens."""
        try:
            receipts = await self._commit([waiting.body for waiting in batch])
        except FortPointError as error:
            _fail(batch, f"the record could not be written: {error.message}")
        except asyncio.CancelledError:
            _fail([*batch, *self._waiting], "the record was closed while it was written")
            raise
        except Exception:  # the edge of this task: a writer that died would leave callers hanging
            _logger.exception("the audit log's writer failed")
            _fail(batch, "the record could not be written")
        else:
            for waiting, receipt in zip(batch, receipts, strict=True):
                if not waiting.receipt.done():
                    waiting.receipt.set_result(receipt)

    async def _commit(self, bodies: list[bytes]) -> list[Receipt]:
        batch = await self._database.write(lambda connection: self._extend(connection, bodies))
        # Only now, after the commit: a batch that failed must not move the head.
        self._frontier = batch.after
        return [Receipt(batch.start + n, leaf.hex()) for n, leaf in enumerate(batch.leaves)]

    def _extend(self, connection: Connection, bodies: list[bytes]) -> _Batch:
        """In a thread, inside the transaction."""
        before = _head(connection, self._signer.verifier, self._frontier)
        # 1. Every entry at its place. 2. The tree over them. 3. The tree's signed head.
        entries = [seal(body, before.size + n) for n, body in enumerate(bodies)]
        leaves = [leaf_hash(entry) for entry in entries]
        after = before.extend(leaves)
        connection.execute(_INSERT_ENTRIES, _rows(before.size, entries, leaves))
        connection.execute(_INSERT_CHECKPOINT, [self._checkpoint(after)])
        return _Batch(before.size, leaves, after)

    def _checkpoint(self, frontier: Frontier) -> dict[str, Any]:
        root = frontier.root()
        return {
            "size": frontier.size,
            "root_hash": root,
            "frontier": frontier.to_bytes(),
            "note": self._signer.sign_checkpoint(frontier.size, root),
        }


def _rows(start: int, entries: list[bytes], leaves: list[bytes]) -> list[dict[str, Any]]:
    return [
        {"index": start + n, "leaf_hash": leaf, "entry": entry}
        for n, (entry, leaf) in enumerate(zip(entries, leaves, strict=True))
    ]


def _fail(batch: list[_Waiting], message: str) -> None:
    for waiting in batch:
        if not waiting.receipt.done():
            waiting.receipt.set_exception(AuditUnavailable(message))


def _is_empty(connection: Connection) -> bool:
    for column in (audit_entries.c.index, audit_checkpoints.c.size):
        if connection.execute(select(column).limit(1)).first() is not None:
            return False
    return True


def _head(connection: Connection, key: VerifierKey, known: Frontier) -> Frontier:
    """The log's frontier as this transaction sees it. ``known`` is what we last saw or wrote.

    Raises ``VerificationError`` where the stored head is not signed, does not cover every
    entry, or is behind what this process has already acknowledged.
    """
    row = connection.execute(_NEWEST).first()
    if row is None:
        stray = connection.execute(select(_NEWEST_INDEX)).scalar_one()
        if known.size or stray is not None:
            raise VerificationError(f"it lost its checkpoints; {_ADVICE}")
        return Frontier()
    if row.newest_index != row.size - 1 or row.size < known.size:
        raise VerificationError(f"its newest checkpoint does not match its entries; {_ADVICE}")
    if row.size == known.size:
        if row.root_hash != known.root():
            raise VerificationError(f"its newest checkpoint was changed; {_ADVICE}")
        return known
    return _trusted_frontier(key, row.note, row.size, row.frontier)


_ADVICE = "run `fortpoint audit verify`"


def _trusted_frontier(key: VerifierKey, note: bytes, size: int, data: bytes) -> Frontier:
    try:
        checkpoint = key.open_checkpoint(note)
        frontier = Frontier.from_bytes(size, data)
    except (VerificationError, ValueError):
        raise VerificationError(f"its newest checkpoint does not verify; {_ADVICE}") from None
    if checkpoint.size != size or checkpoint.root_hash != frontier.root():
        raise VerificationError(f"its newest checkpoint does not verify; {_ADVICE}")
    return frontier
