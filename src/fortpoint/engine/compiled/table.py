"""What a pass reads: the numbers that say where everything is."""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Any


class Entries(IntEnum):
    """Places in a table of int64, numbered from 0 in the order in which they are listed."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[Any]) -> int:
        return count


class Table(Entries):
    """What a pass reads: int64 numbers, most of them addresses. Shapes are in comments."""

    # the model
    D_MODEL = auto()
    D_MLP = auto()
    N_HEADS = auto()
    N_KV_HEADS = auto()
    HEAD_DIM = auto()
    LAYERS = auto()  # int64 [n_layers, Column]
    HEAD = auto()  # int64 [5], a matrix
    EMBEDDING = auto()  # int64 [5], a matrix
    FINAL_NORM = auto()  # float32 [d_model]
    COS = auto()  # float32 [n_positions, head_dim / 2]
    SIN = auto()
    SCALARS = auto()  # float32: epsilon of norms, scale of scores
    # the cache: the address of the first block, and bytes
    KV_BASE = auto()
    KV_LAYER = auto()
    KV_SIZES = auto()  # int64: of a head's keys, of a block; queries of a row; room for scores
    KV_HALF = auto()
    # this step
    N_THREADS = auto()
    SYNC = auto()  # int64 [64]
    N_ROWS = auto()
    TOKENS = auto()  # int64 [n_rows]
    PLACE = auto()  # int64 [n_rows, 2]: position, number of the chain
    CHAINS = auto()  # int64 [n_chains, CHAIN]
    CHAIN = auto()
    N_TASKS = auto()
    TASKS = auto()  # int64 [n_tasks, 3]: first row, rows, key head
    LAST_LAYER = auto()
    TAP_SLOTS = auto()  # int64 [n_layers], -1 for none
    N_LOGITS = auto()
    LOGIT_ROWS = auto()  # int64 [n_logits]
    N_EDITS = auto()  # of EDIT_STARTS
    EDIT_STARTS = auto()  # int64 [n_edits]
    EDITS = auto()  # int64: the addresses of an EditTable's columns
    ADAPTERS = auto()  # int64 [n_rows], -1 for none; address 0 where no row has one
    PAIRS = auto()  # int64 [n_adapters, n_layers, 4, 3]
    N_LAYERS = auto()
    # room to work in
    X = auto()  # float32 [rows, d_model]
    ACTS = auto()  # rows.Activations of d_model or all heads
    WIDE = auto()  # rows.Activations of d_mlp
    QKV = auto()  # float32 [rows, all heads]
    SEEN = auto()  # float32 [slots, SEEN_ROWS, d_model]
    SEEN_ROWS = auto()
    LOGITS = auto()  # float32 [n_logits, padded vocabulary]
    INNER = auto()  # float32 [rows, INNER_SIZE]
    INNER_SIZE = auto()
    SCRATCH = auto()  # float32 [n_threads, SCRATCH_SIZE]: scores, queries, mixed
    SCRATCH_SIZE = auto()
    TILES = auto()  # float32 [n_threads, 2, rows, 16]
    TILES_SIZE = auto()


class Column(IntEnum):
    """Of a layer: addresses of norms (0 for none), the window, and five for each matrix:
    address, number of its kind, tiles, inputs, address of the bias (or 0)."""

    NORM_ATTENTION = 0
    NORM_MLP = 1
    NORM_QUERY = 2
    NORM_KEY = 3
    WINDOW = 4
    QKV = 5
    OUT = 10
    GATE_UP = 15
    DOWN = 20


N_COLUMNS = 25
SITES = 4
"""Where an adapter may add: qkv, out, gate_up, down."""
