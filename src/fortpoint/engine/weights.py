"""A model's weights, packed for the compiled forward pass, and the table that points to them.

Matrices that share their input are one: queries, keys and values; gate and up, whose tiles of
sixteen outputs alternate so that both halves of a gated number are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.architecture import Architecture
from fortpoint.engine.checkpoint import Checkpoint
from fortpoint.engine.compiled.packed import Packed, pack
from fortpoint.engine.compiled.table import N_COLUMNS, Column
from fortpoint.engine.compiled.vector import LANES
from fortpoint.engine.precision import Precision

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One block. ``norm_query`` and ``norm_key`` are ``[head_dim]`` where the family has them."""

    norm_attention: Floats
    norm_mlp: Floats
    norm_query: Floats | None
    norm_key: Floats | None
    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed

    @property
    def matrices(self) -> tuple[Packed, Packed, Packed, Packed]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """``head`` is the embedding itself where the two are tied."""

    embedding: Packed
    head: Packed
    final_norm: Floats
    layers: tuple[LayerWeights, ...]

    @classmethod
    def read(
        cls, checkpoint: Checkpoint, architecture: Architecture, precision: Precision
    ) -> ModelWeights:
        """Packs one matrix after the other. Raises ``ModelError``."""
        shape = (architecture.vocab_size, architecture.d_model)
        raw = checkpoint.get("model.embed_tokens.weight", shape)
        embedding = head = pack(raw, precision.kind_of(raw, head=True))
        if not architecture.tied:
            raw = checkpoint.get("lm_head.weight", shape)
            head = pack(raw, precision.kind_of(raw, head=True))
        reader = _LayerReader(checkpoint, architecture, precision)
        return cls(
            embedding=embedding,
            head=head,
            final_norm=checkpoint.get("model.norm.weight", (architecture.d_model,)),
            layers=tuple(reader.read(layer) for layer in range(architecture.n_layers)),
        )

    @property
    def matrices(self) -> Iterator[Packed]:
        """Every matrix, in the order of the pass."""
        yield self.embedding
        for layer in self.layers:
            yield from layer.matrices
        yield self.head

    def layer_table(self, windows: Sequence[int]) -> Numbers:
        """``[n_layers, Column]`` for ``forward.Table.LAYERS``; ``self`` must be kept alive."""
        table = np.zeros((len(self.layers), N_COLUMNS), np.int64)
        for row, layer, window in zip(table, self.layers, windows, strict=True):
            row[Column.NORM_ATTENTION] = layer.norm_attention.ctypes.data
            row[Column.NORM_MLP] = layer.norm_mlp.ctypes.data
            row[Column.NORM_QUERY] = _address(layer.norm_query)
            row[Column.NORM_KEY] = _address(layer.norm_key)
            row[Column.WINDOW] = window
            columns = (Column.QKV, Column.OUT, Column.GATE_UP, Column.DOWN)
            for column, matrix in zip(columns, layer.matrices, strict=True):
                row[column : column + 5] = matrix_entry(matrix)
        return table


def matrix_entry(matrix: Packed) -> Numbers:
    """The five numbers that say where a matrix is."""
    address, bias = matrix.data.ctypes.data, _address(matrix.bias)
    return np.array([address, matrix.code, matrix.n_tiles, matrix.n_inputs, bias], np.int64)


def alternate(gate: Floats, up: Floats) -> Floats:
    """Rows of both by turns, sixteen at a time: ``[2 n, ...]`` from ``[n, ...]`` each."""
    tiles = [part.reshape(-1, LANES, *part.shape[1:]) for part in (gate, up)]
    return np.stack(tiles, axis=1).reshape(-1, *gate.shape[1:])


def _address(values: Floats | None) -> int:
    return 0 if values is None else values.ctypes.data


class _LayerReader:
    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, precision: Precision
    ) -> None:
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._precision = precision

    def read(self, layer: int) -> LayerWeights:
        a, block = self._architecture, f"model.layers.{layer}"
        d_heads, d_kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        parts = {"q_proj": d_heads, "k_proj": d_kv, "v_proj": d_kv}
        gate, up = (
            self._checkpoint.get(f"{mlp}.{name}.weight", (a.d_mlp, a.d_model))
            for name in ("gate_proj", "up_proj")
        )
        return LayerWeights(
            norm_attention=self._vector(f"{block}.input_layernorm.weight", a.d_model),
            norm_mlp=self._vector(f"{block}.post_attention_layernorm.weight", a.d_model),
            norm_query=self._head_norm(f"{attention}.q_norm.weight"),
            norm_key=self._head_norm(f"{attention}.k_norm.weight"),
            qkv=self._stacked(attention, parts, a.qkv_bias),
            out=self._stacked(attention, {"o_proj": a.d_model}, a.out_bias, d_heads),
            gate_up=self._pack(alternate(gate, up)),
            down=self._stacked(mlp, {"down_proj": a.d_model}, False, a.d_mlp),
        )

    def _stacked(
        self, module: str, parts: dict[str, int], bias: bool, d_in: int | None = None
    ) -> Packed:
        """Matrices of one input, one above the other."""
        d_in = self._architecture.d_model if d_in is None else d_in
        get = self._checkpoint.get
        weights = [get(f"{module}.{name}.weight", (n, d_in)) for name, n in parts.items()]
        biases = None
        if bias:
            each = [get(f"{module}.{name}.bias", (n,)) for name, n in parts.items()]
            biases = np.concatenate(each)
        return self._pack(np.concatenate(weights), biases)

    def _pack(self, weight: Floats, bias: Floats | None = None) -> Packed:
        return pack(weight, self._precision.kind_of(weight), bias)

    def _head_norm(self, name: str) -> Floats | None:
        a = self._architecture
        return self._vector(name, a.head_dim) if a.qk_norm else None

    def _vector(self, name: str, n: int) -> Floats:
        return self._checkpoint.get(name, (n,))
