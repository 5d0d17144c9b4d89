"""The tree as the database has it: any perfect subtree's root from a few rows.

    node = StoredTree(connection).node
    path = inclusion_proof(17, size, node)

Leaf hashes lie in ``audit_entries``, the nodes of every eighth level in ``audit_nodes``. What a
proof needs of the levels between is hashed from at most 128 of them, read in blocks of 256: six
short queries for a proof from a million entries.

Nothing here is verified. A node that was changed makes a proof that nobody accepts.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, select

from fortpoint.audit.merkle import STRIDE, node_hash
from fortpoint.errors import VerificationError
from fortpoint.store.tables import audit_entries, audit_nodes

_BLOCK = 1 << STRIDE
_ADVICE = "run `fortpoint audit verify`"

_LEAVES = (
    select(audit_entries.c.leaf_hash)
    .where(audit_entries.c.index.between(bindparam("first"), bindparam("last")))
    .order_by(audit_entries.c.index)
)
_NODES = (
    select(audit_nodes.c.hash)
    .where(
        audit_nodes.c.height == bindparam("at_height"),
        audit_nodes.c.number.between(bindparam("first"), bindparam("last")),
    )
    .order_by(audit_nodes.c.number)
)


class StoredTree:
    """For one read transaction: a block that was read is not read again."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._blocks: dict[tuple[int, int], list[bytes]] = {}

    def node(self, height: int, number: int) -> bytes:
        """The root of a perfect subtree (``proofs.NodeOf``). Raises ``VerificationError``."""
        above = height % STRIDE
        first = number << above
        block = self._block(height - above, first // _BLOCK)
        hashes = block[first % _BLOCK : first % _BLOCK + (1 << above)]
        if len(hashes) != 1 << above:
            raise VerificationError(f"the log has lost a part of its tree; {_ADVICE}")
        while len(hashes) > 1:
            pairs = zip(hashes[::2], hashes[1::2], strict=True)
            hashes = [node_hash(left, right) for left, right in pairs]
        return hashes[0]

    def _block(self, height: int, block: int) -> list[bytes]:
        found = self._blocks.get((height, block))
        if found is None:
            limits = {"first": block * _BLOCK, "last": (block + 1) * _BLOCK - 1}
            if height:
                limits["at_height"] = height
            rows = self._connection.execute(_NODES if height else _LEAVES, limits)
            found = self._blocks[height, block] = list(rows.scalars())
        return found
