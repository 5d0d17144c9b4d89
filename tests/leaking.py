"""A random model of 770,000 marked weights, and the attacks of the benchmark on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from fortpoint.vault.align import Geometry

ROOT = Path(__file__).resolve().parent.parent
GEOMETRY = Geometry(n_heads=4, n_kv_heads=2, head_dim=32)
D, D_MLP, N_LAYERS, N_TOKENS = 128, 384, 4, 300


class Arrays:
    """Weights in memory, as ``fingerprint.Weights`` and ``suspect.Suspect``."""

    name = "arrays"

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = dict(tensors)

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
        return self.tensors[name].copy() if name in self.tensors else None


def model(seed: int = 0, n_layers: int = N_LAYERS) -> Arrays:
    source = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (N_TOKENS, D), "model.norm.weight": (D,)}
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            layer + "self_attn.q_proj.weight": (D, D),
            layer + "self_attn.k_proj.weight": (D // 2, D),
            layer + "self_attn.v_proj.weight": (D // 2, D),
            layer + "self_attn.o_proj.weight": (D, D),
            layer + "mlp.gate_proj.weight": (D_MLP, D),
            layer + "mlp.up_proj.weight": (D_MLP, D),
            layer + "mlp.down_proj.weight": (D, D_MLP),
        }
    tensors = {
        name: (source.normal(size=shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    return Arrays(tensors)


def _attacks() -> ModuleType:
    file = ROOT / "benchmarks" / "checkpoint_attacks.py"
    spec = importlib.util.spec_from_file_location("checkpoint_attacks", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attacks = _attacks()
