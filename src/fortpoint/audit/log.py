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

Several processes, on one machine or on many, may append to one database: what a batch writes,
and why two cannot fork the log, is in ``audit.batch``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlalchemy import Connection

from fortpoint.audit import batch as batches
from fortpoint.audit import signing_key
from fortpoint.audit.batch import Item
from fortpoint.audit.checkpoint import Signer, VerifierKey
from fortpoint.audit.entry import MAX_ENTRY_BYTES, Content, Entry, encode
from fortpoint.audit.merkle import Frontier
from fortpoint.errors import AuditUnavailable, FortPointError
from fortpoint.store.database import Database

MAX_BATCH_ENTRIES = 1024
MAX_BATCH_BYTES = 8 * 1024 * 1024
MAX_WAITING_ENTRIES = 16_384

_logger = logging.getLogger(__name__)


class Receipt(msgspec.Struct, frozen=True):
    """Where an entry is, and the hexadecimal leaf hash that it is bound by."""

    index: int
    leaf_hash: str


@dataclass(frozen=True, slots=True)
class _Waiting:
    item: Item
    receipt: asyncio.Future[Receipt]


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
                empty = await connection.run_sync(batches.is_empty)
                signer = signing_key.load_or_create(home, may_create=empty)
                frontier = await connection.run_sync(batches.head, signer.verifier, Frontier())
        except AuditUnavailable:
            raise
        except FortPointError as error:
            raise AuditUnavailable(f"the record cannot be opened: {error.message}") from error
        return cls(database, signer, frontier)

    @property
    def verifier_key(self) -> VerifierKey:
        return self._signer.verifier

    async def append(
        self,
        entry: Entry,
        content: Content | None = None,
        also: Callable[[Connection], None] | None = None,
    ) -> Receipt:
        """Record ``entry``; returns once it is durable. Raises ``AuditUnavailable``.

        ``content`` is kept beside it. ``also`` is done in the same transaction, in another
        thread: it happens and is recorded, or neither. A caller that is cancelled while
        waiting leaves the entry in the queue.
        """
        item = Item(encode(entry), entry.request_id, content, also)
        if _size(item) > MAX_ENTRY_BYTES:
            raise AuditUnavailable("the record cannot hold this entry: it is too large")
        if self._closing or self._writer.done():
            raise AuditUnavailable("the record is closed")
        if len(self._waiting) >= MAX_WAITING_ENTRIES:
            raise AuditUnavailable("the record cannot keep up; try again")
        receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, receipt))
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
            n_bytes += _size(batch[-1].item)
        return batch

    async def _settle(self, batch: list[_Waiting]) -> None:
        """Commit the batch and tell every caller, whatever happens."""
        try:
            receipts = await self._commit([waiting.item for waiting in batch])
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

    async def _commit(self, items: list[Item]) -> list[Receipt]:
        batch = await self._database.write(
            lambda connection: batches.write(connection, self._signer, self._frontier, items)
        )
        # Only now, after the commit: a batch that failed must not move the head.
        self._frontier = batch.after
        return [Receipt(batch.start + n, leaf.hex()) for n, leaf in enumerate(batch.leaves)]


def _size(item: Item) -> int:
    content = item.content
    beside = 0 if content is None else len(content.request or b"") + len(content.response or b"")
    return len(item.body) + beside


def _fail(batch: list[_Waiting], message: str) -> None:
    for waiting in batch:
        if not waiting.receipt.done():
            waiting.receipt.set_exception(AuditUnavailable(message))
