"""The Merkle tree of RFC 9162, grown at its right edge.

    frontier = Frontier()
    frontier = frontier.extend([leaf_hash(b"first"), leaf_hash(b"second")])
    frontier.root().hex()

A ``Frontier`` keeps the roots of the perfect subtrees that the leaves so far fall into (at
most one for each bit of ``size``, largest first). That is all that appending and the root
need, so neither ever reads an older leaf: both take O(log n).

A ``Node`` is the root of a perfect subtree. ``grow`` gives those of every eighth level as they
become whole: kept, they are what a proof needs in place of all leaves (``audit.proofs``).

A tree proves nothing by itself: whoever changes a leaf can compute a new root. The signed
checkpoints in ``audit.checkpoint`` are what binds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
STRIDE = 8  # levels between the nodes that are kept


def leaf_hash(entry: bytes) -> bytes:
    """RFC 9162 section 2.1.1: SHA-256(0x00 || entry)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 9162 section 2.1.1: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Node:
    """The root of the perfect subtree over leaves ``number << height`` and what follows."""

    height: int
    number: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Frontier:
    """The right edge of a tree of ``size`` leaves."""

    size: int = 0
    hashes: tuple[bytes, ...] = ()

    def extend(self, leaf_hashes: Iterable[bytes]) -> Frontier:
        """The frontier after these leaves."""
        return self.grow(leaf_hashes, [])

    def grow(self, leaf_hashes: Iterable[bytes], nodes: list[Node]) -> Frontier:
        """The frontier after these leaves; the nodes to keep that they made whole are added."""
        size, hashes = self.size, list(self.hashes)
        sha256 = hashlib.sha256
        for leaf in leaf_hashes:
            # Every trailing one bit of the size is a subtree that this leaf makes whole.
            carry, ones, height = leaf, size, 0
            while ones & 1:
                carry = sha256(b"\x01" + hashes.pop() + carry).digest()
                ones >>= 1
                height += 1
                if height % STRIDE == 0:
                    nodes.append(Node(height, size >> height, carry))
            hashes.append(carry)
            size += 1
        return Frontier(size, tuple(hashes))

    def root(self) -> bytes:
        """RFC 9162 section 2.1.1: the Merkle Tree Hash of all leaves so far."""
        if not self.hashes:
            return EMPTY_ROOT
        root = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            root = node_hash(left, root)
        return root

    def to_bytes(self) -> bytes:
        return b"".join(self.hashes)

    @classmethod
    def from_bytes(cls, size: int, data: bytes) -> Frontier:
        """The inverse of ``to_bytes``. Raises ``ValueError``.

        What comes back is only as good as its ``root()``: compare that with a signed one.
        """
        if size < 0 or len(data) != HASH_BYTES * size.bit_count():
            raise ValueError("a frontier has one hash for each set bit of its size")
        return cls(
            size, tuple(data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES))
        )
