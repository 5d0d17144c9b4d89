"""The Merkle tree against published vectors, another implementation, and the definition."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from fortpoint.audit.merkle import EMPTY_ROOT, Frontier, leaf_hash, node_hash

# The inputs and roots of the Certificate Transparency reference tests (RFC 6962, whose tree
# hash RFC 9162 keeps): transparency-dev/merkle, testonly/constants.go, LeafInputs and
# RootHashes; also google/certificate-transparency, cpp/merkletree/merkle_tree_test.cc.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def recursive_root(leaves: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    left, right = recursive_root(leaves[:k]), recursive_root(leaves[k:])
    return hashlib.sha256(b"\x01" + left + right).digest()


def frontier_of(leaves: list[bytes]) -> Frontier:
    return Frontier().extend(leaf_hash(leaf) for leaf in leaves)


@pytest.mark.parametrize("size", range(len(ROOTS)))
def test_root_matches_the_certificate_transparency_vectors(size: int) -> None:
    assert frontier_of(LEAVES[:size]).root().hex() == ROOTS[size]


def test_root_of_seven_leaves_has_the_shape_of_rfc_9162_section_2_1_5() -> None:
    a, b, c, d, e, f, j = (leaf_hash(b"d%d" % n) for n in range(7))
    g, h, i = node_hash(a, b), node_hash(c, d), node_hash(e, f)
    k, last = node_hash(g, h), node_hash(i, j)
    expected = node_hash(k, last)
    assert frontier_of([b"d%d" % n for n in range(7)]).root() == expected


def test_leaf_and_node_hashes_are_apart() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != node_hash(left, right)
    assert leaf_hash(b"") != EMPTY_ROOT


@pytest.mark.parametrize("size", [*range(1, 66), 127, 128, 129, 1000])
def test_root_matches_pymerkle(size: int) -> None:
    leaves = [b"leaf %d" % n for n in range(size)]
    oracle = InmemoryTree(algorithm="sha256")
    for leaf in leaves:
        oracle.append_entry(leaf)
    assert frontier_of(leaves).root() == oracle.get_root()


@given(st.lists(st.binary(max_size=40), max_size=70), st.data())
def test_frontier_equals_the_recursive_definition_however_it_was_split(
    leaves: list[bytes], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(leaves)))
    frontier = frontier_of(leaves[:cut])
    assert frontier.root() == recursive_root(leaves[:cut])
    stored = Frontier.from_bytes(frontier.size, frontier.to_bytes())
    extended = stored.extend(leaf_hash(leaf) for leaf in leaves[cut:])
    assert extended.size == len(leaves)
    assert extended.root() == recursive_root(leaves)
    assert len(extended.hashes) == len(leaves).bit_count()


@pytest.mark.parametrize(
    ("size", "data"), [(1, b""), (0, bytes(32)), (3, bytes(32)), (1, bytes(31)), (-1, bytes(32))]
)
def test_frontier_of_the_wrong_length_refused(size: int, data: bytes) -> None:
    with pytest.raises(ValueError, match="one hash"):
        Frontier.from_bytes(size, data)


def test_frontier_extended_leaves_the_old_one_as_it_was() -> None:
    before = frontier_of(LEAVES[:5])
    root = before.root()
    before.extend([leaf_hash(b"x")])
    assert (before.size, before.root()) == (5, root)
