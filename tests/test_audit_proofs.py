"""Proofs: against another implementation, and nothing that was changed may pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from fortpoint.audit.merkle import STRIDE, Frontier, Node, leaf_hash, node_hash
from fortpoint.audit.proofs import (
    check_consistency,
    consistency_proof,
    inclusion_proof,
    inclusion_root,
    root_hash,
)
from fortpoint.errors import VerificationError

LEAVES = [leaf_hash(b"leaf %d" % n) for n in range(300)]


def node(height: int, number: int) -> bytes:
    if height == 0:
        return LEAVES[number]
    return node_hash(node(height - 1, 2 * number), node(height - 1, 2 * number + 1))


def root(size: int) -> bytes:
    return Frontier().extend(LEAVES[:size]).root()


@pytest.mark.parametrize("size", [*range(1, 34), 255, 256, 257, 300])
def test_inclusion_proof_of_every_leaf_leads_to_the_root(size: int) -> None:
    for index in range(size):
        path = inclusion_proof(index, size, node)
        assert inclusion_root(LEAVES[index], index, size, path) == root(size)


@pytest.mark.parametrize("new", [*range(1, 34), 256, 257, 300])
def test_consistency_proof_of_every_earlier_size_holds(new: int) -> None:
    for old in range(new + 1):
        check_consistency(old, root(old), new, root(new), consistency_proof(old, new, node))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 21, 64, 100])
def test_proofs_match_pymerkle(size: int) -> None:
    oracle = InmemoryTree(algorithm="sha256")
    for n in range(size):
        oracle.append_entry(b"leaf %d" % n)
    for index in range(size):
        theirs = oracle.prove_inclusion(index + 1, size).path[1:]
        assert [bytes(one) for one in theirs] == inclusion_proof(index, size, node)


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0)])
def test_inclusion_proof_outside_of_the_tree_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="inside the tree"):
        inclusion_proof(index, size, node)
    with pytest.raises(VerificationError):
        inclusion_root(LEAVES[0], index, size, [])


@given(st.data())
def test_inclusion_proof_changed_in_any_way_is_refused(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 300))
    index = data.draw(st.integers(0, size - 1))
    path = inclusion_proof(index, size, node)
    changed = data.draw(_changed(path))
    try:
        found = inclusion_root(LEAVES[index], index, size, changed)
    except VerificationError:
        return
    assert found != root(size)


@given(st.data())
def test_consistency_proof_changed_in_any_way_is_refused(data: st.DataObject) -> None:
    new = data.draw(st.integers(2, 300))
    old = data.draw(st.integers(1, new - 1))
    path = consistency_proof(old, new, node)
    with pytest.raises(VerificationError):
        check_consistency(old, root(old), new, root(new), data.draw(_changed(path)))


@given(st.integers(1, 299), st.integers(0, 298))
def test_consistency_with_a_rewritten_history_is_refused(new: int, at: int) -> None:
    old = min(at + 1, new)
    forged = Frontier().extend([*LEAVES[: old - 1], leaf_hash(b"forged")]).root()
    with pytest.raises(VerificationError):
        check_consistency(old, forged, new, root(new), consistency_proof(old, new, node))


def _changed(path: list[bytes]) -> st.SearchStrategy[list[bytes]]:
    """Shortened, lengthened, reordered, or with one bit of one hash changed."""
    made: list[list[bytes]] = [[*path, bytes(32)], [bytes(32), *path]]
    if path:
        made += [path[1:], path[:-1], []]
    if len(set(path)) > 1:
        made.append(path[::-1])
    flips = [
        [*path[:n], bytes([path[n][0] ^ 1]) + path[n][1:], *path[n + 1 :]] for n in range(len(path))
    ]
    return st.sampled_from([one for one in [*made, *flips] if one != path])


def test_log_that_became_shorter_is_refused() -> None:
    with pytest.raises(VerificationError, match="shorter"):
        check_consistency(5, root(5), 4, root(4), [])


def test_nodes_to_keep_are_those_of_every_eighth_level() -> None:
    nodes: list[Node] = []
    leaves = [leaf_hash(b"%d" % n) for n in range(66_000)]
    whole = Frontier().grow(leaves, nodes)
    assert whole.root() == Frontier().extend(leaves).root()
    assert [(one.height, one.number) for one in nodes if one.height == STRIDE] == [
        (STRIDE, n) for n in range(66_000 // 256)
    ]
    assert [(one.height, one.number) for one in nodes if one.height > STRIDE] == [(16, 0)]
    assert nodes[0].hash == Frontier().extend(leaves[:256]).root()


def test_root_of_any_size_comes_from_perfect_subtrees() -> None:
    asked: list[int] = []

    def counted(height: int, number: int) -> bytes:
        asked.append(height)
        return node(height, number)

    read: Callable[[int, int], bytes] = counted
    assert root_hash(300, read) == root(300)
    assert asked == [8, 5, 3, 2]
    assert root_hash(0, read) == root(0)
