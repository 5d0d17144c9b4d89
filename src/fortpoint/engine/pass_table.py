"""One step, written down as the numbers that the compiled forward pass reads.

The arrays that the table points to are kept here as long as the program may read them. Room to
work in grows with the largest step that came, and is used again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.architecture import Architecture
from fortpoint.engine.compiled.attention import BLOCK
from fortpoint.engine.compiled.rows import Activations
from fortpoint.engine.compiled.table import Table
from fortpoint.engine.compiled.vector import LANES
from fortpoint.engine.kv_cache import KVCache, KVPool
from fortpoint.engine.lora import LoraAdapter
from fortpoint.engine.model import Floats, Result, Span, Step
from fortpoint.engine.packed_adapter import PackedAdapter
from fortpoint.engine.weights import ModelWeights, matrix_entry

Numbers = NDArray[np.int64]

_QUERIES_AT_ONCE = 24
"""Rows of a prompt attend together as long as they have no more query heads than this."""
_ROWS_GROW = 64
_SYNC = 64


class PassTable:
    """The table of one model, whose ``address`` the program is given."""

    def __init__(
        self,
        architecture: Architecture,
        weights: ModelWeights,
        pool: KVPool,
        max_context: int,
        threads: int,
    ) -> None:
        self._architecture = architecture
        self._threads = threads
        self._numbers = np.zeros(len(Table), np.int64)
        self.address = self._numbers.ctypes.data
        self._kept: dict[Table, NDArray[np.generic]] = {}
        self._adapters: dict[str, PackedAdapter] = {}
        self._queries = max(1, _QUERIES_AT_ONCE // architecture.group) * architecture.group
        self._capacity = -(-max_context // BLOCK) * BLOCK
        self._n_rows = self._n_logits = self._n_seen = self._rank = 0
        self._put_model(weights, max_context)
        self._put_pool(pool)

    def write(self, step: Step, caches: Sequence[KVCache], n_threads: int) -> None:
        """Make the program compute ``step`` next, in so many threads."""
        n_rows = len(step.tokens)
        self._set(Table.N_THREADS, n_threads)
        adapters = self._pack_adapters(step.spans)
        self._make_room(n_rows, len(step.logit_rows), len(step.tap_layers), adapters)
        last = self._architecture.n_layers - 1 if step.last_layer is None else step.last_layer
        chains, place = _places(step.spans, caches, n_rows)
        tasks = self._tasks(step.spans)
        slots = np.full(self._architecture.n_layers, -1, np.int64)
        slots[list(step.tap_layers)] = range(len(step.tap_layers))
        self._put(Table.SYNC, np.zeros(_SYNC, np.int64))
        self._put(Table.TOKENS, np.array(step.tokens, np.int64))
        self._put(Table.PLACE, place)
        self._put(Table.CHAINS, chains)
        self._put(Table.TASKS, tasks)
        self._put(Table.TAP_SLOTS, slots)
        self._put(Table.LOGIT_ROWS, np.array(step.logit_rows, np.int64))
        self._set(Table.N_ROWS, n_rows)
        self._set(Table.CHAIN, chains.shape[1])
        self._set(Table.N_TASKS, len(tasks))
        self._set(Table.LAST_LAYER, last)
        self._set(Table.N_LOGITS, len(step.logit_rows))
        self._put_edits(step)
        self._put_adapters(step.spans, n_rows, adapters)

    def result(self, step: Step) -> Result:
        """What the program left of ``step``."""
        n_rows, x = len(step.tokens), self._floats(Table.X)
        seen, logits = self._floats(Table.SEEN), self._floats(Table.LOGITS)
        return Result(
            residual=x[:n_rows],
            logits=logits[: len(step.logit_rows), : self._architecture.vocab_size],
            seen={layer: seen[i, :n_rows] for i, layer in enumerate(step.tap_layers)},
        )

    def _set(self, entry: Table, number: int) -> None:
        self._numbers[entry] = number

    def _put(self, entry: Table, array: NDArray[np.generic]) -> None:
        """Point to ``array``, and keep it."""
        self._kept[entry] = array
        self._numbers[entry] = array.ctypes.data

    def _floats(self, entry: Table) -> Floats:
        array = self._kept[entry]
        return array  # type: ignore[return-value]

    def _put_model(self, weights: ModelWeights, max_context: int) -> None:
        a = self._architecture
        self._weights = weights  # the table points into it
        self._set(Table.D_MODEL, a.d_model)
        self._set(Table.D_MLP, a.d_mlp)
        self._set(Table.N_HEADS, a.n_heads)
        self._set(Table.N_KV_HEADS, a.n_kv_heads)
        self._set(Table.HEAD_DIM, a.head_dim)
        self._set(Table.N_LAYERS, a.n_layers)
        self._put(Table.LAYERS, weights.layer_table(a.windows))
        self._put(Table.HEAD, matrix_entry(weights.head))
        self._put(Table.EMBEDDING, matrix_entry(weights.embedding))
        self._put(Table.FINAL_NORM, weights.final_norm)
        self._put(Table.SCALARS, np.array([a.norm_eps, a.score_scale], np.float32))
        angles = np.outer(np.arange(max_context), a.inv_freq)
        self._put(Table.COS, (np.cos(angles) * a.rotary_scale).astype(np.float32))
        self._put(Table.SIN, (np.sin(angles) * a.rotary_scale).astype(np.float32))

    def _put_pool(self, pool: KVPool) -> None:
        shape = pool.shape
        sizes = (shape.head_bytes, shape.block_bytes, self._architecture.group, self._capacity)
        self._put(Table.KV_BASE, pool.data)
        self._put(Table.KV_SIZES, np.array(sizes, np.int64))
        self._set(Table.KV_LAYER, pool.n_blocks * shape.block_bytes)
        self._set(Table.KV_HALF, int(shape.half))
        scratch = self._queries * (2 * shape.head_dim + self._capacity)
        self._put(Table.SCRATCH, np.zeros((self._threads, scratch), np.float32))
        self._set(Table.SCRATCH_SIZE, scratch)

    def _make_room(
        self, n_rows: int, n_logits: int, n_seen: int, adapters: Sequence[PackedAdapter]
    ) -> None:
        a, d_heads = self._architecture, self._architecture.n_heads * self._architecture.head_dim
        rank = max((adapter.rank for adapter in adapters), default=0)
        grows = n_rows > self._n_rows
        if grows:
            self._n_rows = rows = -(-n_rows // _ROWS_GROW) * _ROWS_GROW
            d_qkv = -(-(d_heads + 2 * a.n_kv_heads * a.head_dim) // LANES) * LANES
            self._put(Table.X, np.zeros((rows, a.d_model), np.float32))
            self._put(Table.QKV, np.zeros((rows, d_qkv), np.float32))
            self._acts = Activations(rows * max(a.d_model, d_heads))
            self._wide = Activations(rows * a.d_mlp)
            self._put(Table.ACTS, self._acts.addresses)
            self._put(Table.WIDE, self._wide.addresses)
            self._put(Table.TILES, np.zeros((self._threads, 2, rows, LANES), np.float32))
            self._set(Table.TILES_SIZE, 2 * rows * LANES)
        if grows or n_seen > self._n_seen or Table.SEEN not in self._kept:
            self._n_seen = max(n_seen, self._n_seen)
            shape = (self._n_seen, self._n_rows, a.d_model)
            self._put(Table.SEEN, np.zeros(shape, np.float32))
            self._set(Table.SEEN_ROWS, self._n_rows)
        if n_logits > self._n_logits or Table.LOGITS not in self._kept:
            self._n_logits = n_logits
            width = -(-a.vocab_size // LANES) * LANES
            self._put(Table.LOGITS, np.zeros((n_logits, width), np.float32))
        if rank and (grows or rank > self._rank or Table.INNER not in self._kept):
            self._rank = max(rank, self._rank)
            self._put(Table.INNER, np.zeros((self._n_rows, self._rank), np.float32))
            self._set(Table.INNER_SIZE, self._rank)

    def _tasks(self, spans: Sequence[Span]) -> Numbers:
        """Attention by spans, rows of a prompt and key heads: ``[n, 3]``."""
        n_kv, rows = self._architecture.n_kv_heads, self._queries // self._architecture.group
        pieces = [
            (first, min(rows, span.end - first))
            for span in spans
            for first in range(span.start, span.end, rows)
        ]
        tasks = np.empty((len(pieces), n_kv, 3), np.int64)
        tasks[:, :, :2] = np.array(pieces, np.int64)[:, None]
        tasks[:, :, 2] = np.arange(n_kv)
        return tasks.reshape(-1, 3)

    def _put_edits(self, step: Step) -> None:
        if step.edits is None:
            self._set(Table.N_EDITS, 0)
            return
        columns = [column.ctypes.data for column in step.edits.table]
        self._put(Table.EDITS, np.array(columns, np.int64))
        self._put(Table.EDIT_STARTS, step.edits.starts)
        self._set(Table.N_EDITS, len(step.edits.starts))

    def _pack_adapters(self, spans: Sequence[Span]) -> list[PackedAdapter]:
        """Those of this step, each packed when it is first used."""
        used = {span.adapter.name: span.adapter for span in spans if span.adapter is not None}
        for name, adapter in used.items():
            if name not in self._adapters:
                if not isinstance(adapter, LoraAdapter):
                    raise TypeError("this adapter belongs to another model")
                self._adapters[name] = PackedAdapter(adapter, self._architecture)
        return [self._adapters[name] for name in used]

    def _put_adapters(
        self, spans: Sequence[Span], n_rows: int, adapters: Sequence[PackedAdapter]
    ) -> None:
        if not adapters:
            self._set(Table.ADAPTERS, 0)
            return
        number = {adapter.name: i for i, adapter in enumerate(adapters)}
        rows = np.full(n_rows, -1, np.int64)
        for span in spans:
            if span.adapter is not None:
                rows[span.start : span.end] = number[span.adapter.name]
        self._put(Table.ADAPTERS, rows)
        self._put(Table.PAIRS, np.stack([adapter.pairs for adapter in adapters]))


def _places(
    spans: Sequence[Span], caches: Sequence[KVCache], n_rows: int
) -> tuple[Numbers, Numbers]:
    """The chains of blocks ``[n_spans, longest]``, and each row's position and chain."""
    chains = np.zeros((len(spans), max(len(cache.blocks) for cache in caches)), np.int64)
    place = np.empty((n_rows, 2), np.int64)
    for i, (span, cache) in enumerate(zip(spans, caches, strict=True)):
        chains[i, : len(cache.blocks)] = cache.blocks
        positions = range(cache.length, cache.length + span.end - span.start)
        place[span.start : span.end, 0] = positions
        place[span.start : span.end, 1] = i
    return chains, place
