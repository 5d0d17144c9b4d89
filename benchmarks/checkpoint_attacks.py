"""What somebody does to a copy before it is found, as suspects that compute tensors when asked.

    suspect = Disguised(Changed(Copies(base, [key]), pruned(0.3)), geometry, seed=1)
    suspect.get("model.layers.0.mlp.up_proj.weight")

Quantisers are the ``gguf`` package's, but for Q4_K, which it only reads: ours makes its blocks of
256 (eight of 32, six-bit scales and minima) from each sub-block's extremes, without llama.cpp's
search for the best scale.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from fortpoint.vault.align import MATRICES, Geometry
from fortpoint.vault.fingerprint import MarkedCheckpoint, is_marked

Array = np.ndarray
Change = Callable[[str, Array, Array], Array]
"""Tensor's name, its weights, the base's; returns the weights after."""

_SUPER, _SUB = 256, 32


class Copies:
    """The average of the copies of these leases: one is a leak, several are collusion."""

    def __init__(self, base, keys: Sequence[bytes]) -> None:
        self.name = f"average of {len(keys)}"
        self.base = base
        self._copies = [MarkedCheckpoint(base, key) for key in keys]

    def get(self, tensor: str) -> Array | None:
        if tensor not in self.base:
            return None
        if not is_marked(tensor):
            return self.base.get(tensor)
        total = self._copies[0].get(tensor)
        for copy in self._copies[1:]:
            total += copy.get(tensor)
        total /= np.float32(len(self._copies))
        return total


class Changed:
    """Each matrix of the body by itself: rounding, pruning, merging, training."""

    def __init__(self, suspect, *changes: Change) -> None:
        self.name = suspect.name
        self.base = suspect.base
        self._suspect = suspect
        self._changes = changes

    def get(self, tensor: str) -> Array | None:
        weight = self._suspect.get(tensor)
        if weight is not None and is_marked(tensor):
            for change in self._changes:
                weight = change(tensor, weight, self.base.get(tensor))
        return weight


def bfloat16(name: str, weight: Array, base: Array) -> Array:
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def through(kind: gguf.GGMLQuantizationType) -> Change:
    """Quantised as a GGUF file holds it, and read again."""

    def change(name: str, weight: Array, base: Array) -> Array:
        return dequantize(quantize(weight, kind), kind).astype(np.float32)

    return change


def q4_k(name: str, weight: Array, base: Array) -> Array:
    """Rows are cut through where they are no multiple of 256, which is harsher than llama.cpp's
    way of giving such tensors more bits."""
    blocks = weight.reshape(-1, _SUPER // _SUB, _SUB)
    low = np.minimum(blocks.min(-1), 0)
    scale = (blocks.max(-1) - low) / 15
    d = (scale.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    d_min = (-low.min(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.nan_to_num(np.clip(np.rint(scale / d), 0, 63)) * d
        offset = np.nan_to_num(np.clip(np.rint(-low / d_min), 0, 63)) * d_min
        q = np.nan_to_num(np.clip(np.rint((blocks + offset[..., None]) / scale[..., None]), 0, 15))
    return (q * scale[..., None] - offset[..., None]).reshape(weight.shape).astype(np.float32)


def pruned(share: float) -> Change:
    """The smallest weights of each matrix become zero."""

    def change(name: str, weight: Array, base: Array) -> Array:
        limit = np.quantile(np.abs(weight), share)
        return np.where(np.abs(weight) < limit, np.float32(0), weight)

    return change


def merged_half(name: str, weight: Array, base: Array) -> Array:
    return (weight + base) / np.float32(2)


def added(deltas) -> Change:
    """What fine-tuning changed, tensor by tensor, measured on a real run."""

    def change(name: str, weight: Array, base: Array) -> Array:
        return weight + deltas.get(name)

    return change


class Disguised:
    """Computes the same as ``suspect``, in other numbers: neurons and heads in another order,
    scaled and mixed; with ``rotate`` also the residual stream turned and the gains folded."""

    def __init__(self, suspect, geometry: Geometry, seed: int = 0, rotate: bool = False) -> None:
        self.name = f"{suspect.name}, disguised"
        self.base = suspect.base
        self._suspect, self._geometry, self._seed = suspect, geometry, seed
        self._rotation: Array | None = None
        if rotate:
            d = self.base.shape("model.norm.weight")[0]
            square = np.random.default_rng(seed).normal(size=(d, d))
            self._rotation = np.linalg.qr(square)[0].astype(np.float32)

    def get(self, tensor: str) -> Array | None:
        weight = self._suspect.get(tensor)
        if weight is None:
            return None
        if tensor == "model.embed_tokens.weight" and self._rotation is not None:
            return weight @ self._rotation
        block, _, rest = tensor.partition("self_attn." if "self_attn" in tensor else "mlp.")
        kind = next((kind for kind, path in MATRICES.items() if tensor.endswith(path)), None)
        if kind is None:
            return np.ones_like(weight) if rest == "" and self._rotation is not None else weight
        weight = self._turned(block, kind, weight)
        source = np.random.default_rng([self._seed, zlib.crc32(block.encode())])
        return (
            self._neurons(kind, weight, source)
            if "mlp" in tensor
            else self._heads(kind, weight, source)
        )

    def _turned(self, block: str, kind: str, weight: Array) -> Array:
        if self._rotation is None:
            return weight
        if kind in ("o", "down"):
            return self._rotation.T @ weight
        norm = "input" if kind in "qkv" else "post_attention"
        gain = self._suspect.get(f"{block}{norm}_layernorm.weight")
        return (weight * gain) @ self._rotation

    @staticmethod
    def _neurons(kind: str, weight: Array, source: np.random.Generator) -> Array:
        n = len(weight) if kind != "down" else weight.shape[1]
        order = source.permutation(n)
        scale = (source.choice([-1, 1], n) * np.exp(source.normal(size=n))).astype(np.float32)
        if kind == "gate":
            return weight[order]
        return (weight * scale[:, None])[order] if kind == "up" else (weight / scale)[:, order]

    def _heads(self, kind: str, weight: Array, source: np.random.Generator) -> Array:
        g = self._geometry
        per_group, half = g.n_heads // g.n_kv_heads, g.head_dim // 2
        groups = source.permutation(g.n_kv_heads)
        within = [source.permutation(per_group) for _ in groups]
        heads = [group * per_group + i for group, order in zip(groups, within, strict=True)
                 for i in order]  # fmt: skip
        mix = source.normal(size=(g.n_kv_heads, g.head_dim, g.head_dim)) / g.head_dim**0.5
        mix = (mix + 2 * np.eye(g.head_dim)).astype(np.float32)
        turn = np.exp(source.normal(size=(g.n_kv_heads, half))) * np.exp(
            1j * source.uniform(0, 2 * np.pi, (g.n_kv_heads, half))
        )
        parts = (weight.T if kind == "o" else weight).reshape(-1, g.head_dim, self._width(weight))
        parts = parts.copy()
        for i, part in enumerate(parts):
            group = i if kind in "kv" else i // per_group
            if kind == "v":
                parts[i] = mix[group] @ part
            elif kind == "o":
                parts[i] = np.linalg.inv(mix[group]).T @ part
            else:
                factor = turn[group] if kind == "k" else 1 / turn[group].conj()
                z = (part[:half] + 1j * part[half:]) * factor[:, None]
                parts[i] = np.concatenate([z.real, z.imag])
        parts = parts[groups] if kind in "kv" else parts[heads]
        flat = parts.reshape(-1, parts.shape[-1])
        return np.ascontiguousarray(flat.T if kind == "o" else flat)

    def _width(self, weight: Array) -> int:
        return self.base.shape("model.norm.weight")[0]
