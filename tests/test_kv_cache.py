"""Blocks are shared, given back and found again, and never by another salt."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.engine.kv_cache import KVCache, KVPool, KVShape

SHAPE = KVShape(n_layers=2, n_kv_heads=1, head_dim=16, half=True)
BLOCK_BYTES = SHAPE.n_layers * SHAPE.block_bytes
TOKENS = list(range(100))


def pool(n_blocks: int) -> KVPool:
    return KVPool(SHAPE, n_blocks * BLOCK_BYTES)


def filled(of: KVPool, n_tokens: int) -> KVCache:
    cache = KVCache(of)
    assert cache.reserve(n_tokens)
    cache.length = n_tokens
    return cache


def rows(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32)[:, None]


def test_reserve_beyond_memory_is_refused_and_changes_nothing() -> None:
    of = pool(4)
    first, second = filled(of, 96), KVCache(of)
    assert not second.reserve(33)
    assert second.blocks == []
    assert second.reserve(32)
    first.release()
    assert second.reserve(128)


def test_fork_shares_full_blocks_and_copies_the_last() -> None:
    of = pool(4)
    cache = filled(of, 40)
    of.data[:, cache.blocks[1]] = 7
    fork = cache.fork()
    assert fork is not None
    assert fork.blocks[0] == cache.blocks[0]
    assert fork.blocks[1] != cache.blocks[1]
    assert (of.data[:, fork.blocks[1]] == 7).all()
    cache.release()
    assert of.n_available == 2
    fork.release()
    assert of.n_available == 4


def test_fork_without_memory_for_the_last_block_is_none() -> None:
    of = pool(2)
    assert filled(of, 40).fork() is None


def test_adopt_takes_the_longest_known_beginning() -> None:
    of = pool(8)
    filled(of, 100).publish(TOKENS, "a", rows(100))
    other = KVCache(of)
    adopted = other.adopt([*TOKENS[:70], 5, 6], "a")
    assert adopted is not None
    assert np.array_equal(adopted, rows(64))
    assert other.length == 64


def test_adopt_leaves_the_last_token_to_compute() -> None:
    of = pool(8)
    filled(of, 64).publish(TOKENS, "a", rows(64))
    other = KVCache(of)
    assert len(other.adopt(TOKENS[:64], "a")) == 32


@pytest.mark.parametrize(
    ("tokens", "salt"), [(TOKENS, "b"), ([1, *TOKENS], "a"), (TOKENS[:32], "a")]
)
def test_adopt_of_what_nobody_published_is_none(tokens: list[int], salt: str) -> None:
    of = pool(8)
    filled(of, 64).publish(TOKENS, "a", rows(64))
    other = KVCache(of)
    assert other.adopt(tokens, salt) is None
    assert other.length == 0


def test_published_blocks_outlive_their_sequence_until_memory_is_needed() -> None:
    of = pool(3)
    cache = filled(of, 64)
    cache.publish(TOKENS, "a", rows(64))
    cache.release()
    assert of.n_available == 3
    again = KVCache(of)
    assert len(again.adopt(TOKENS, "a")) == 64
    again.release()
    filled(of, 96).release()
    assert KVCache(of).adopt(TOKENS, "a") is None


def test_memory_is_taken_from_the_end_of_an_unused_prefix_first() -> None:
    of = pool(3)
    cache = filled(of, 64)
    cache.publish(TOKENS, "a", rows(64))
    cache.release()
    filled(of, 64)
    assert len(KVCache(of).adopt(TOKENS, "a")) == 32


def test_blocks_in_use_are_never_reclaimed() -> None:
    of = pool(2)
    cache = filled(of, 64)
    cache.publish(TOKENS, "a", rows(64))
    assert not KVCache(of).reserve(1)


def test_new_block_is_finite() -> None:
    of = pool(1)
    of.data[:] = 255  # NaN in bfloat16
    cache = filled(of, 1)
    assert not of.data[:, cache.blocks[0]].any()
