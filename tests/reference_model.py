"""A Llama in plain numpy, row by row: the simplest thing that keeps ``model.py``'s contract.

Every row is computed alone, so nothing can depend on its neighbours or on how a prompt was cut;
what a real engine computes can be compared with it. It stands in for one, too: its memory is
counted in tokens, prefixes are shared by copies, and a token can be made to break the step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import tiny_model
from fortpoint.engine.model import Floats, Result, Span, Step

BLOCK = 16


@dataclass(frozen=True)
class ReferenceAdapter:
    """Makes the MLP's part of its rows ``1 + scale`` times as large."""

    name: str
    scale: float


@dataclass(frozen=True)
class _Published:
    kv: Floats
    rows: Floats


class Memory:
    """Room for ``n_tokens``; what was published gives way, the least recently used first."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.n_used = 0
        self._published: OrderedDict[tuple[str, tuple[int, ...]], _Published] = OrderedDict()

    def take(self, n_tokens: int) -> bool:
        while self.n_used + n_tokens + self._n_published() > self.n_tokens:
            if not self._published:
                return False
            self._published.popitem(last=False)
        self.n_used += n_tokens
        return True

    def keep(self, key: tuple[str, tuple[int, ...]], published: _Published) -> None:
        self._published.pop(key, None)
        if self.take(len(key[1])):
            self.n_used -= len(key[1])
            self._published[key] = published

    def find(self, tokens: Sequence[int], salt: str) -> tuple[int, _Published] | None:
        best: tuple[int, _Published] | None = None
        for (other, known), published in self._published.items():
            n = _n_common(tokens, known) if other == salt else 0
            if n and (best is None or n > best[0]):
                best = n, published
        return best

    def _n_published(self) -> int:
        return sum(len(tokens) for _, tokens in self._published)


class ReferenceCache:
    """``kv`` is ``[n_layers, 2, n_kv_heads, capacity, head_dim]``."""

    def __init__(self, shape: tuple[int, int, int], memory: Memory) -> None:
        self._shape = shape
        self._memory = memory
        self.length = 0
        self.kv = self._room(0)

    def _room(self, n_tokens: int) -> Floats:
        n_layers, n_kv, head_dim = self._shape
        return np.zeros((n_layers, 2, n_kv, n_tokens, head_dim), np.float32)

    @property
    def capacity(self) -> int:
        return self.kv.shape[3]

    def reserve(self, n_tokens: int) -> bool:
        wanted = -(-n_tokens // BLOCK) * BLOCK
        if wanted <= self.capacity:
            return True
        if not self._memory.take(wanted - self.capacity):
            return False
        grown = self._room(wanted)
        grown[:, :, :, : self.length] = self.kv[:, :, :, : self.length]
        self.kv = grown
        return True

    def fork(self) -> ReferenceCache | None:
        fork = ReferenceCache(self._shape, self._memory)
        if not fork.reserve(self.length):
            return None
        fork.kv[:, :, :, : self.length] = self.kv[:, :, :, : self.length]
        fork.length = self.length
        return fork

    def release(self) -> None:
        self._memory.n_used -= self.capacity
        self.kv, self.length = self._room(0), 0

    def adopt(self, tokens: Sequence[int], salt: str) -> Floats | None:
        assert self.capacity == 0, "only an empty cache adopts"
        found = self._memory.find(tokens[:-1], salt)
        if found is None or not self.reserve(found[0]):
            return None
        n, published = found
        self.kv[:, :, :, :n] = published.kv[:, :, :, :n]
        self.length = n
        return published.rows[:n].copy()

    def publish(self, tokens: Sequence[int], salt: str, rows: Floats) -> None:
        n = min(self.length, len(tokens))
        assert len(rows) >= n
        kept = _Published(self.kv[:, :, :, :n].copy(), rows[:n].copy())
        self._memory.keep((salt, tuple(tokens[:n])), kept)


class ReferenceModel:
    """``tiny_model``'s weights. ``raises_at`` is a token that no step survives."""

    architecture = "llama"
    precision = "float32"

    def __init__(self, n_tokens: int = 4096, max_context: int = 512, **changes: Any) -> None:
        self.config = tiny_model.config(**changes)
        made = tiny_model.weights(self.config)
        self.weights = {name: tensor.numpy() for name, tensor in made.items()}
        self.memory = Memory(n_tokens)
        self.max_context = min(max_context, n_tokens)
        self.d_model: int = self.config["hidden_size"]
        self.n_layers: int = self.config["num_hidden_layers"]
        self.vocab_size: int = self.config["vocab_size"]
        self.head_dim = self.d_model // self.config["num_attention_heads"]
        self.raises_at: int | None = None
        self.steps: list[Step] = []

    @property
    def n_used(self) -> int:
        return self.memory.n_used

    def new_cache(self) -> ReferenceCache:
        shape = (self.n_layers, self.config["num_key_value_heads"], self.head_dim)
        return ReferenceCache(shape, self.memory)

    def close(self) -> None:
        pass

    def forward(self, step: Step) -> Result:
        self.steps.append(step)
        if self.raises_at is not None and self.raises_at in step.tokens:
            raise RuntimeError("out of memory at 0xdeadbeef")
        x = self.weights["model.embed_tokens.weight"][list(step.tokens)]
        seen: dict[int, Floats] = {}
        last = self.n_layers - 1 if step.last_layer is None else step.last_layer
        for layer in range(last + 1):
            for span in step.spans:
                self._block(layer, span, x)
            if step.edits is not None:
                step.edits.apply(layer, x)
            if layer in step.tap_layers:
                seen[layer] = x.copy()
        for span in step.spans:
            _cache(span).length += span.end - span.start
        head = self.weights["model.embed_tokens.weight"]
        logits = [head @ self.normed(x[row]) for row in step.logit_rows]
        return Result(x, np.array(logits, np.float32).reshape(-1, self.vocab_size), seen)

    def normed(self, x: Floats) -> Floats:
        return self._norm(x, "model.norm.weight")

    def _norm(self, x: Floats, weight: str) -> Floats:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return (x / scale * self.weights[weight]).astype(np.float32)

    def _block(self, layer: int, span: Span, x: Floats) -> None:
        name, scale = f"model.layers.{layer}.", 1.0
        if span.adapter is not None:
            assert isinstance(span.adapter, ReferenceAdapter)
            scale += span.adapter.scale
        for i, row in enumerate(range(span.start, span.end)):
            normed = self._norm(x[row], name + "input_layernorm.weight")
            x[row] += self._attention(layer, _cache(span), _cache(span).length + i, normed)
            normed = self._norm(x[row], name + "post_attention_layernorm.weight")
            gate = self.weights[name + "mlp.gate_proj.weight"] @ normed
            up = self.weights[name + "mlp.up_proj.weight"] @ normed
            mlp = self.weights[name + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
            x[row] += np.float32(scale) * mlp

    def _attention(
        self, layer: int, cache: ReferenceCache, position: int, normed: Floats
    ) -> Floats:
        name, n_kv = f"model.layers.{layer}.self_attn.", self.config["num_key_value_heads"]
        q, k, v = (
            (self.weights[f"{name}{which}_proj.weight"] @ normed).reshape(-1, self.head_dim)
            for which in "qkv"
        )
        assert position < cache.capacity, "no room was reserved"
        kept = cache.kv[layer]
        kept[0, :, position], kept[1, :, position] = self._rotated(k, position), v
        queries = self._rotated(q, position).reshape(n_kv, -1, self.head_dim)
        keys, values = kept[0, :, : position + 1], kept[1, :, : position + 1]
        scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(np.float32(self.head_dim))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = weights / weights.sum(axis=-1, keepdims=True) @ values
        out: Floats = self.weights[name + "o_proj.weight"] @ mixed.reshape(-1)
        return out

    def _rotated(self, heads: Floats, position: int) -> Floats:
        half = self.head_dim // 2
        angles = position * self.config["rope_theta"] ** (-np.arange(half) / half)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first, second = heads[:, :half], heads[:, half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def _cache(span: Span) -> ReferenceCache:
    assert isinstance(span.cache, ReferenceCache)
    return span.cache


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        n += 1
    return n
