"""The Llama family's forward pass over many sequences at once, with a view inside.

Rows are tokens of any sequences, flattened: a prompt's chunk is many rows, a decode step is
one row. Matrix products run over all rows together; attention runs sequence by sequence
against that sequence's cache. After each block the residual stream may be read.

    x = embed(tokens)
    for block: x += attention(norm(x)); x += mlp(norm(x)); read(x)
    logits = unembed(norm(x[last rows]))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fortpoint.engine.kv_cache import KVBudget, KVCache
from fortpoint.errors import ModelError

Reader = Callable[[int, Tensor], None]


class LlamaConfig(msgspec.Struct, frozen=True):
    """The fields of ``config.json`` that the forward pass needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    hidden_act: str = "silu"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def load(cls, folder: Path) -> LlamaConfig:
        try:
            config = msgspec.convert(json.loads((folder / "config.json").read_bytes()), cls)
        except (OSError, ValueError, msgspec.ValidationError) as error:
            raise ModelError(f"config.json of the model cannot be used: {error}") from None
        if config.model_type != "llama" or config.hidden_act != "silu":
            raise ModelError(f"architecture {config.model_type!r} is not supported yet")
        return config


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``end`` are the next tokens of one sequence."""

    cache: KVCache
    start: int
    end: int


@dataclass(frozen=True)
class _Block:
    norm_attention: Tensor  # [d_model]
    qkv: Tensor  # [(n_heads + 2 n_kv_heads) * head_dim, d_model]
    out: Tensor  # [d_model, n_heads * head_dim]
    norm_mlp: Tensor  # [d_model]
    gate_up: Tensor  # [2 * d_mlp, d_model]
    down: Tensor  # [d_model, d_mlp]


class Llama:
    """Weights and the forward pass. Not thread-safe: one thread computes."""

    def __init__(
        self,
        config: LlamaConfig,
        embedding: Tensor,
        unembedding: Tensor,
        final_norm: Tensor,
        blocks: Sequence[_Block],
        max_context: int,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.max_context = min(max_context, config.max_position_embeddings)
        self._embedding = embedding
        self._unembedding = unembedding
        self._final_norm = final_norm
        self._blocks = tuple(blocks)
        self._cos, self._sin = _rotary_table(config, self.max_context, embedding.dtype)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, max_context: int) -> Llama:
        """Read ``model.safetensors``; tensors are cast to ``dtype`` one by one."""
        config = LlamaConfig.load(folder)
        try:
            weights = _Weights(folder / "model.safetensors", dtype)
            return cls._from_tensors(config, weights, max_context)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"model.safetensors cannot be used: {type(error).__name__}") from None

    @classmethod
    def _from_tensors(cls, config: LlamaConfig, weights: _Weights, max_context: int) -> Llama:
        embedding = weights["model.embed_tokens.weight"]
        unembedding = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        blocks = []
        for i in range(config.num_hidden_layers):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            blocks.append(
                _Block(
                    weights[f"model.layers.{i}.input_layernorm.weight"],
                    weights.stacked(*(f"{attention}.{n}_proj.weight" for n in "qkv")),
                    weights[f"{attention}.o_proj.weight"],
                    weights[f"model.layers.{i}.post_attention_layernorm.weight"],
                    weights.stacked(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
                    weights[f"{mlp}.down_proj.weight"],
                )
            )
        norm = weights["model.norm.weight"]
        return cls(config, embedding, unembedding, norm, blocks, max_context)

    @property
    def n_layers(self) -> int:
        return len(self._blocks)

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that the cache of one token takes."""
        config = self.config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return values * self.dtype.itemsize

    def cache(self, budget: KVBudget) -> KVCache:
        """An empty cache for one sequence."""
        config = self.config
        return KVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            self.dtype,
            budget,
        )

    def forward(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        read: Reader | None = None,
        until_layer: int | None = None,
    ) -> Tensor:
        """Advance every span's sequence by its rows; return the residual stream.

        ``tokens`` is ``[n_rows]``; every cache has room for its rows. ``read(layer, x)`` sees
        the residual stream ``[n_rows, d_model]`` after each block and must not write it.
        ``until_layer`` stops after that block (0-based), inclusive. Returns ``[n_rows,
        d_model]``, before the final norm.
        """
        positions = torch.cat(
            [torch.arange(s.cache.length, s.cache.length + s.end - s.start) for s in spans]
        )
        rotary = (self._cos[positions, None], self._sin[positions, None])
        masks = [_causal_mask(span, self._group) for span in spans]
        x = F.embedding(torch.tensor(tokens), self._embedding)
        last = self.n_layers - 1 if until_layer is None else until_layer
        for layer, block in enumerate(self._blocks[: last + 1]):
            x = x + self._attention(layer, block, x, spans, masks, rotary)
            x = x + self._mlp(block, x)
            if read is not None:
                read(layer, x)
        for span in spans:
            span.cache.length += span.end - span.start
        return x

    def normed(self, x: Tensor) -> Tensor:
        """The residual stream ``[n, d_model]`` after the final norm."""
        return self._norm(x, self._final_norm)

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream ``[n, d_model]`` to logits ``[n, vocab]`` in float32."""
        return F.linear(self.normed(x), self._unembedding).float()

    @property
    def _group(self) -> int:
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _mlp(self, block: _Block, x: Tensor) -> Tensor:
        gate, up = F.linear(self._norm(x, block.norm_mlp), block.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, block.down)

    def _attention(
        self,
        layer: int,
        block: _Block,
        x: Tensor,
        spans: Sequence[Span],
        masks: Sequence[Tensor | None],
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        config = self.config
        n_heads, n_kv, head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        qkv = F.linear(self._norm(x, block.norm_attention), block.qkv)
        q, k, v = torch.split(qkv.view(len(x), -1, head_dim), [n_heads, n_kv, n_kv], dim=1)
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        mixed = torch.empty((len(x), n_heads * head_dim), dtype=x.dtype)
        for span, mask in zip(spans, masks, strict=True):
            rows = slice(span.start, span.end)
            self._attend(layer, span, mask, q[rows], k[rows], v[rows], mixed[rows])
        return F.linear(mixed, block.out)

    def _attend(
        self,
        layer: int,
        span: Span,
        mask: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> None:
        """One sequence: store keys and values ``[t, n_kv, head_dim]``, attend, write ``out``.

        The query heads of one key head are laid out as further rows, so that keys need no
        repeating: ``[n_kv, group * t, head_dim]``.
        """
        cache, t, group = span.cache, len(q), self._group
        end = cache.length + t
        cache.keys[layer, :, cache.length : end] = k.transpose(0, 1)
        cache.values[layer, :, cache.length : end] = v.transpose(0, 1)
        n_kv, head_dim = k.shape[1:]
        queries = q.view(t, n_kv, group, head_dim).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(
            queries.reshape(1, n_kv, group * t, head_dim),
            cache.keys[None, layer, :, :end],
            cache.values[None, layer, :, :end],
            attn_mask=mask,
        )
        rows = mixed.view(n_kv, group, t, head_dim).permute(2, 0, 1, 3)
        out.view(t, n_kv, group, head_dim).copy_(rows)


class _Weights:
    """The file is opened for each tensor: a map that stays open keeps its pages in memory."""

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        self._file = file
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(self._dtype, copy=True)

    def stacked(self, *names: str) -> Tensor:
        """Several matrices of one input as one, so that one product computes them all."""
        return torch.cat([self[name] for name in names])


def _rotary_table(
    config: LlamaConfig, n_positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[n_positions, head_dim]`` of rotary embedding (arXiv 2104.09864)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(n_positions).float(), config.rope_theta**-half)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _causal_mask(span: Span, group: int) -> Tensor | None:
    """``[group * t, length + t]``, True where a row may look; None for a single row."""
    t = span.end - span.start
    if t == 1:
        return None
    mask = torch.ones((t, span.cache.length + t), dtype=torch.bool).tril(span.cache.length)
    return mask.repeat(group, 1)
