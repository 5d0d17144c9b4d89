"""What one commit writes: its entries at their places, and the signed head of the tree over them.

    batch = write(connection, signer, known, items)       # inside a write transaction

1. Every entry at its place, what belongs to it beside it.
2. The tree over them, and the nodes that proofs need of it.
3. The tree's signed head: a new checkpoint for every commit. The one before it stays where it
   is the last of its 256 entries, and is replaced where it is not, so that a long log of lone
   requests does not hold, and a verification does not check, a signature for each of them.

The head is read in the same transaction. One that another process moved is taken only with
that process's valid signature. Two heads cannot fork: the index is the primary key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update

from fortpoint.audit.checkpoint import Signer, VerifierKey
from fortpoint.audit.entry import Content, seal
from fortpoint.audit.merkle import Frontier, Node, leaf_hash
from fortpoint.errors import VerificationError
from fortpoint.store.rows import add_rows
from fortpoint.store.tables import (
    audit_checkpoints,
    audit_contents,
    audit_entries,
    audit_nodes,
)

CHECKPOINT_SPAN = 256
MAX_REQUEST_ID_BYTES = 64

_ENTRY = ("index", "leaf_hash", "entry")
_BESIDE = ("index", "request_id", "salt", "request", "response")
_NODE = ("height", "number", "hash")

# Built once: each batch of each request waits for them.
_INSERT_CHECKPOINT = insert(audit_checkpoints)
_REPLACE_CHECKPOINT = update(audit_checkpoints).where(
    audit_checkpoints.c.size == bindparam("replaced")
)
_NEWEST_INDEX = select(func.max(audit_entries.c.index)).scalar_subquery()
_NEWEST = (
    select(audit_checkpoints, _NEWEST_INDEX.label("newest_index"))
    .order_by(audit_checkpoints.c.size.desc())
    .limit(1)
)
_ADVICE = "run `fortpoint audit verify`"


@dataclass(frozen=True, slots=True)
class Item:
    """An entry's bytes (``entry.encode``), what is kept beside it, what else is done with it.

    ``also`` runs in the same transaction: it and the entry are there together or not at all.
    """

    body: bytes
    request_id: str
    content: Content | None = None
    also: Callable[[Connection], None] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Where it began, its leaves, the tree after it."""

    start: int
    leaves: list[bytes]
    after: Frontier


def write(connection: Connection, signer: Signer, known: Frontier, items: Sequence[Item]) -> Batch:
    """Write the items. ``known`` is the head that this process last saw.

    Raises ``VerificationError`` where the stored head is not what it should be.
    """
    before = head(connection, signer.verifier, known)
    entries = [seal(item.body, before.size + n) for n, item in enumerate(items)]
    leaves = [leaf_hash(entry) for entry in entries]
    places = range(before.size, before.size + len(items))
    rows = list(zip(places, leaves, entries, strict=True))
    beside = [(place, *_beside(item)) for place, item in zip(places, items, strict=True)]
    add_rows(connection, audit_entries, _ENTRY, rows)
    add_rows(connection, audit_contents, _BESIDE, beside)
    for item in items:
        if item.also is not None:
            item.also(connection)
    nodes: list[Node] = []
    after = before.grow(leaves, nodes)
    if nodes:
        made = [(node.height, node.number, node.hash) for node in nodes]
        add_rows(connection, audit_nodes, _NODE, made)
    _put_checkpoint(connection, before, _checkpoint(signer, after))
    return Batch(before.size, leaves, after)


def is_empty(connection: Connection) -> bool:
    """Whether there is neither an entry nor a checkpoint."""
    for column in (audit_entries.c.index, audit_checkpoints.c.size):
        if connection.execute(select(column).limit(1)).first() is not None:
            return False
    return True


def head(connection: Connection, key: VerifierKey, known: Frontier) -> Frontier:
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


def _trusted_frontier(key: VerifierKey, note: bytes, size: int, data: bytes) -> Frontier:
    try:
        checkpoint = key.open_checkpoint(note)
        frontier = Frontier.from_bytes(size, data)
    except (VerificationError, ValueError):
        raise VerificationError(f"its newest checkpoint does not verify; {_ADVICE}") from None
    if checkpoint.size != size or checkpoint.root_hash != frontier.root():
        raise VerificationError(f"its newest checkpoint does not verify; {_ADVICE}")
    return frontier


def _put_checkpoint(connection: Connection, before: Frontier, row: dict[str, Any]) -> None:
    if _span(before.size) == _span(row["size"]):
        connection.execute(_REPLACE_CHECKPOINT, {**row, "replaced": before.size})
    else:
        connection.execute(_INSERT_CHECKPOINT, [row])


def _span(size: int) -> int:
    return (size - 1) // CHECKPOINT_SPAN


def _checkpoint(signer: Signer, frontier: Frontier) -> dict[str, Any]:
    root = frontier.root()
    return {
        "size": frontier.size,
        "root_hash": root,
        "frontier": frontier.to_bytes(),
        "note": signer.sign_checkpoint(frontier.size, root),
    }


def _beside(item: Item) -> tuple[bytes | None, ...]:
    content = item.content
    if content is None:
        return _findable(item.request_id), None, None, None
    return _findable(item.request_id), content.salt, content.request, content.response


def _findable(request_id: str) -> bytes | None:
    """Ours are short; one that somebody else made too long is not looked for."""
    encoded = request_id.encode()
    return encoded if len(encoded) <= MAX_REQUEST_ID_BYTES else None
