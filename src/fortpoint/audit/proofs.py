"""Proofs of RFC 9162: that an entry is in the tree, and that a tree is the start of another.

    path = inclusion_proof(17, 1000, node)            # made where the log is
    root = inclusion_root(leaf, 17, 1000, path)       # checked anywhere; compare with a signed one
    check_consistency(1000, old_root, 2000, new_root, consistency_proof(1000, 2000, node))

``node(height, number)`` gives the root of a perfect subtree; where from is the caller's affair.
A proof has at most two hashes for each bit of the size, and verification does not trust its
length: too many or too few hashes refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fortpoint.audit.merkle import EMPTY_ROOT, node_hash
from fortpoint.errors import VerificationError

NodeOf = Callable[[int, int], bytes]
"""The root of the perfect subtree of ``1 << height`` leaves that is the ``number``-th one."""

MAX_SIZE = 2**62


def inclusion_proof(index: int, size: int, node: NodeOf) -> list[bytes]:
    """RFC 9162 section 2.1.3.1: PATH(index, D_size), from the leaf's sibling to the root's child.

    Raises ``ValueError`` unless ``0 <= index < size``.
    """
    if not 0 <= index < size:
        raise ValueError("an inclusion proof is of a leaf inside the tree")
    start, end, path = 0, size, list[bytes]()
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range_hash(middle, end, node))
            end = middle
        else:
            path.append(_range_hash(start, middle, node))
            start = middle
    return path[::-1]


def consistency_proof(old: int, new: int, node: NodeOf) -> list[bytes]:
    """RFC 9162 section 2.1.4.1: PROOF(old, D_new). Empty where ``old`` is 0 or ``new``.

    Raises ``ValueError`` unless ``0 <= old <= new``.
    """
    if not 0 <= old <= new:
        raise ValueError("a consistency proof leads from a smaller tree to a larger one")
    if old in {0, new}:
        return []
    start, end, path, whole = 0, new, list[bytes](), True
    while end != old:
        middle = start + _split(end - start)
        if old <= middle:
            path.append(_range_hash(middle, end, node))
            end = middle
        else:
            path.append(_range_hash(start, middle, node))
            start, whole = middle, False
    if not whole:  # the verifier does not have this subtree's root
        path.append(_range_hash(start, end, node))
    return path[::-1]


def root_hash(size: int, node: NodeOf) -> bytes:
    """The root over the first ``size`` leaves."""
    return _range_hash(0, size, node) if size else EMPTY_ROOT


def inclusion_root(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """RFC 9162 section 2.1.3.2: the root of the tree that has ``leaf`` at ``index``.

    The proof holds only if this is a signed root. Raises ``VerificationError`` for one that has
    the wrong number of hashes.
    """
    if not 0 <= index < size <= MAX_SIZE:
        raise VerificationError("the proof is of an entry outside of the tree")
    number, last, root = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise VerificationError("the inclusion proof has too many hashes")
        if number & 1 or number == last:
            root = node_hash(sibling, root)
            while not number & 1 and number:
                number >>= 1
                last >>= 1
        else:
            root = node_hash(root, sibling)
        number >>= 1
        last >>= 1
    if last:
        raise VerificationError("the inclusion proof has too few hashes")
    return root


def check_consistency(
    old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]
) -> None:
    """RFC 9162 section 2.1.4.2. Raises ``VerificationError`` where the proof does not hold."""
    if not 0 <= old <= new <= MAX_SIZE:
        raise VerificationError("the log became shorter")
    if old in {0, new}:
        expected = EMPTY_ROOT if old == 0 else new_root
        if path or old_root != expected:
            raise VerificationError("the two trees are not the same")
        return
    hashes = [old_root, *path] if old & (old - 1) == 0 else list(path)
    if not hashes:
        raise VerificationError("the consistency proof is empty")
    first, second = _consistency_roots(old, new, hashes)
    if first != old_root or second != new_root:
        raise VerificationError("the consistency proof does not lead from the one to the other")


def _consistency_roots(old: int, new: int, hashes: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The roots of both trees as the proof has them."""
    number, last = old - 1, new - 1
    while number & 1:
        number >>= 1
        last >>= 1
    first = second = hashes[0]
    for one in hashes[1:]:
        if last == 0:
            raise VerificationError("the consistency proof has too many hashes")
        if number & 1 or number == last:
            first, second = node_hash(one, first), node_hash(one, second)
            while not number & 1 and number:
                number >>= 1
                last >>= 1
        else:
            second = node_hash(second, one)
        number >>= 1
        last >>= 1
    if last:
        raise VerificationError("the consistency proof has too few hashes")
    return first, second


def _split(size: int) -> int:
    """The largest power of two smaller than ``size`` (which is at least 2)."""
    return 1 << ((size - 1).bit_length() - 1)


def _range_hash(start: int, end: int, node: NodeOf) -> bytes:
    """The tree hash of leaves ``start`` to ``end``, where ``start`` begins a subtree."""
    roots: list[bytes] = []
    while start < end:
        height = (end - start).bit_length() - 1
        roots.append(node(height, start >> height))
        start += 1 << height
    root = roots.pop()
    while roots:
        root = node_hash(roots.pop(), root)
    return root
