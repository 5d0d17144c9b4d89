"""A LoRA adapter as the compiled forward pass reads it.

The pass adds at four places (``forward.SITES``). Modules that share a matrix there share its
pair: their A are one above the other, their B stand in a block each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.architecture import Architecture
from fortpoint.engine.compiled.table import SITES
from fortpoint.engine.compiled.vector import LANES
from fortpoint.engine.lora import LoraAdapter, LoraPair
from fortpoint.engine.weights import alternate

Floats = NDArray[np.float32]


class PackedAdapter:
    """``pairs`` is ``[n_layers, SITES, 3]``: addresses of A ``[rank, n_in]`` and of B
    ``[n_tiles, rank, 16]``, and the rank (0 where the adapter adds nothing)."""

    def __init__(self, adapter: LoraAdapter, architecture: Architecture) -> None:
        self.name = adapter.name
        self._kept: list[Floats] = []
        self.pairs = np.zeros((architecture.n_layers, SITES, 3), np.int64)
        for layer, modules in enumerate(adapter.layers):
            for site, outputs in enumerate(_sites(architecture)):
                self._put(layer, site, _stacked(modules, outputs))
        self.rank = int(self.pairs[:, :, 2].max(initial=0))

    def _put(self, layer: int, site: int, pair: tuple[Floats, Floats] | None) -> None:
        if pair is None:
            return
        inner, outer = pair
        if site == 2:
            outer = alternate(*np.split(outer, 2))
        n_outputs, rank = outer.shape
        tiles = np.zeros((-(-n_outputs // LANES), rank, LANES), np.float32)
        padded = np.zeros((len(tiles) * LANES, rank), np.float32)
        padded[:n_outputs] = outer
        tiles[:] = padded.reshape(-1, LANES, rank).transpose(0, 2, 1)
        inner = np.ascontiguousarray(inner, np.float32)
        self._kept += [inner, tiles]
        self.pairs[layer, site] = (inner.ctypes.data, tiles.ctypes.data, rank)


def _sites(a: Architecture) -> tuple[dict[str, int], ...]:
    """The modules of each site and their outputs."""
    d_heads, d_kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    return (
        {"q_proj": d_heads, "k_proj": d_kv, "v_proj": d_kv},
        {"o_proj": a.d_model},
        {"gate_proj": a.d_mlp, "up_proj": a.d_mlp},
        {"down_proj": a.d_model},
    )


def _stacked(modules: dict[str, LoraPair], outputs: dict[str, int]) -> tuple[Floats, Floats] | None:
    """A ``[rank, n_in]`` and B ``[n_outputs, rank]`` of all modules of one site together."""
    present = {name: modules[name] for name in outputs if name in modules}
    if not present:
        return None
    inner = np.concatenate([pair.A for pair in present.values()])
    outer = np.zeros((sum(outputs.values()), len(inner)), np.float32)
    row, column = 0, 0
    for name, n in outputs.items():
        if name in present:
            rank = len(present[name].A)
            outer[row : row + n, column : column + rank] = present[name].B
            column += rank
        row += n
    return inner, outer
