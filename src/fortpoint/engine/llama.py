"""The Llama family's forward pass over many sequences at once, with a view inside.

Rows are tokens of any sequences, flattened: a prompt's chunk is many rows, a decode step is
one row of each sequence (a few, where tokens were drafted). Matrix products run over all rows
together. Attention runs once for all sequences that sit in one pool (``kv_cache.py``), and
sequence by sequence for prompts. After each block the residual stream may be read and changed.

    x = embed(tokens)
    for block: x += attention(norm(x)); x += mlp(norm(x)); x = hook(x)
    logits = unembed(norm(x[last rows]))

The residual stream is float32; matrices, keys and values are in the plan's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fortpoint.engine.kv_cache import KVBudget, KVCache, KVShape, Pool, Pools
from fortpoint.engine.linear import Matrix, Plan
from fortpoint.engine.model import Hook, Span
from fortpoint.errors import ModelError

MAX_DECODE_ROWS = 8
"""Spans of up to this many rows decode in a pool; longer ones are prompts."""


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

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.num_attention_heads // self.num_key_value_heads

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
class _Block:
    norm_attention: Tensor  # [d_model]
    qkv: Matrix  # to (n_heads + 2 n_kv_heads) * head_dim
    out: Matrix
    norm_mlp: Tensor  # [d_model]
    gate_up: Matrix  # to 2 * d_mlp
    down: Matrix


@dataclass(frozen=True)
class _Seats:
    """The rows of one pool's sequences in this step, ``n_rows`` of each."""

    pool: Pool
    rows: Tensor | None  # which rows, None for all of them in order
    n_rows: int
    seats: Tensor  # [n, n_rows]
    positions: Tensor  # [n, n_rows]
    mask: Tensor  # [n, 1, n_rows, 1, capacity], 0 or -inf, float32
    whole: bool  # the seats are the pool's first n, in order


class Llama:
    """Weights and the forward pass: a ``Model``. Not thread-safe: one thread computes."""

    def __init__(
        self,
        config: LlamaConfig,
        plan: Plan,
        max_context: int,
        embedding: Tensor,
        unembedding: Matrix,
        final_norm: Tensor,
        blocks: Sequence[_Block],
    ) -> None:
        self.config = config
        self.plan = plan
        self.max_context = min(max_context, config.max_position_embeddings)
        self._embedding = embedding
        self._unembedding = unembedding
        self._final_norm = final_norm
        self._blocks = tuple(blocks)
        self._cos, self._sin = _rotary_table(config, self.max_context, plan.dtype)
        self._eps = torch.tensor(config.rms_norm_eps)
        self._pools: Pools | None = None

    @classmethod
    def load(cls, folder: Path, plan: Plan, max_context: int) -> Llama:
        """Read ``model.safetensors``; matrices are packed one by one. Raises ``ModelError``."""
        config = LlamaConfig.load(folder)
        try:
            return cls._from_file(config, _Weights(folder / "model.safetensors"), plan, max_context)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise ModelError(f"model.safetensors cannot be used: {type(error).__name__}") from None

    @classmethod
    def _from_file(
        cls, config: LlamaConfig, weights: _Weights, plan: Plan, max_context: int
    ) -> Llama:
        embedding = weights["model.embed_tokens.weight"]
        head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        blocks = []
        for i in range(config.num_hidden_layers):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            blocks.append(
                _Block(
                    weights[f"model.layers.{i}.input_layernorm.weight"].float(),
                    Matrix(weights.stacked(*(f"{attention}.{n}_proj.weight" for n in "qkv")), plan),
                    Matrix(weights[f"{attention}.o_proj.weight"], plan),
                    weights[f"model.layers.{i}.post_attention_layernorm.weight"].float(),
                    Matrix(
                        weights.stacked(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), plan
                    ),
                    Matrix(weights[f"{mlp}.down_proj.weight"], plan),
                )
            )
        return cls(
            config,
            plan,
            max_context,
            embedding.to(plan.dtype),
            Matrix(head, Plan(plan.dtype, plan.many, plan.many, 0)),
            weights["model.norm.weight"].float(),
            blocks,
        )

    @property
    def architecture(self) -> str:
        return self.config.model_type

    @property
    def precision(self) -> str:
        return self.plan.name

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory that the cache of one token takes."""
        return self._kv_shape.bytes_per_token

    @property
    def _kv_shape(self) -> KVShape:
        config = self.config
        heads = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        return KVShape(*heads, self.plan.dtype)

    def cache(self, budget: KVBudget) -> KVCache:
        """An empty cache for one sequence; all caches of one budget decode in its pools."""
        if self._pools is None or self._pools.budget is not budget:
            self._pools = Pools(self._kv_shape, budget)
        return KVCache(self._pools)

    def forward(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        hook: Hook | None = None,
        until_layer: int | None = None,
    ) -> Tensor:
        """See ``Model.forward``."""
        step = _Step(spans, len(tokens), self.config.group)
        rotary = (self._cos[step.positions, None], self._sin[step.positions, None])
        x = F.embedding(torch.tensor(tokens), self._embedding).float()
        last = self.n_layers - 1 if until_layer is None else until_layer
        for layer, block in enumerate(self._blocks[: last + 1]):
            x = x + self._attention(layer, block, x, step, rotary)
            x = x + self._mlp(block, x)
            changed = None if hook is None else hook(layer, x)
            x = x if changed is None else changed
        for span in spans:
            span.cache.length += span.end - span.start
        return x

    def normed(self, x: Tensor) -> Tensor:
        """The residual stream ``[n, d_model]`` after the final norm."""
        return self._norm(x, self._final_norm)

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream ``[n, d_model]`` to logits ``[n, vocab]`` in float32."""
        return self._unembedding(self.normed(x)).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm (arXiv 1910.07467) of ``x`` ``[n, d_model]``, in the plan's dtype."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self._eps, length, length, value=1 / x.shape[-1])
        normed = (x * mean_square.rsqrt_()).mul_(weight)
        return normed.to(self.plan.dtype)

    def _mlp(self, block: _Block, x: Tensor) -> Tensor:
        gate, up = block.gate_up(self._norm(x, block.norm_mlp)).chunk(2, dim=-1)
        return block.down(F.silu(gate) * up)

    def _attention(
        self, layer: int, block: _Block, x: Tensor, step: _Step, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        n_heads, n_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = block.qkv(self._norm(x, block.norm_attention))
        heads = qkv.view(len(x), n_heads + 2 * n_kv, self.config.head_dim)
        qk = _rotate(heads[:, : n_heads + n_kv], *rotary)
        q, k, v = qk[:, :n_heads], qk[:, n_heads:], heads[:, n_heads + n_kv :]
        if step.seats and not step.prompts and step.seats[0].rows is None:
            return block.out(self._attend_seats(layer, step.seats[0], q, k, v))
        mixed = torch.empty((len(x), n_heads * self.config.head_dim), dtype=q.dtype)
        for seats in step.seats:
            rows = slice(None) if seats.rows is None else seats.rows
            mixed[rows] = self._attend_seats(layer, seats, q[rows], k[rows], v[rows])
        for span, mask in step.prompts:
            part = slice(span.start, span.end)
            mixed[part] = self._attend_prompt(layer, span, mask, q[part], k[part], v[part])
        return block.out(mixed)

    def _attend_seats(self, layer: int, seats: _Seats, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All sequences of a pool at once; rows in the order of seats.

        ``q`` is ``[n * n_rows, n_heads, head_dim]``. The query heads of one key head, and a
        sequence's rows, are the rows of one small product: keys need no repeating.
        """
        n, n_rows = seats.positions.shape
        n_kv, head_dim, group = k.shape[1], k.shape[2], self.config.group
        kept = seats.pool.layers[layer]
        new = torch.stack([k, v], dim=1).view(n, n_rows, 2, n_kv, head_dim)
        kept[:, seats.seats, :, seats.positions] = new
        kept = kept[:, :n] if seats.whole else kept[:, seats.seats[:, 0]]
        keys, values = kept.reshape(2, n * n_kv, -1, head_dim)
        queries = q.reshape(n, n_rows, n_kv, group, head_dim).transpose(1, 2)
        scores = torch.bmm(
            queries.reshape(n * n_kv, n_rows * group, head_dim), keys.transpose(1, 2)
        ).view(n, n_kv, n_rows, group, -1)
        scores = torch.add(seats.mask, scores, alpha=head_dim**-0.5)
        weights = torch.softmax(scores, dim=-1).to(q.dtype)
        mixed = torch.bmm(weights.view(n * n_kv, n_rows * group, -1), values)
        return (
            mixed.view(n, n_kv, n_rows, group, head_dim)
            .transpose(1, 2)
            .reshape(n * n_rows, n_kv * group * head_dim)
        )

    def _attend_prompt(
        self, layer: int, span: Span, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """One sequence with a cache of its own: ``[t, n_heads * head_dim]``."""
        cache, t, n_kv, head_dim = _own(span), len(q), k.shape[1], k.shape[2]
        if cache.kv is None:
            raise ValueError("a seated sequence cannot read a prompt")
        kept, end = cache.kv[layer], cache.length + t
        kept[0, :, cache.length : end] = k.transpose(0, 1)
        kept[1, :, cache.length : end] = v.transpose(0, 1)
        queries = q.view(t, n_kv, -1, head_dim).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(
            queries.reshape(1, n_kv, -1, head_dim),
            kept[None, 0, :, :end],
            kept[None, 1, :, :end],
            attn_mask=mask,
        )
        return mixed.view(n_kv, -1, t, head_dim).permute(2, 0, 1, 3).reshape(t, -1)


class _Step:
    """Where the rows of one step belong: to the seats of pools, or to prompts."""

    def __init__(self, spans: Sequence[Span], n_tokens: int, group: int) -> None:
        self.positions = torch.cat(
            [torch.arange(s.cache.length, s.cache.length + s.end - s.start) for s in spans]
        )
        pools: dict[tuple[int, int], list[Span]] = {}
        self.prompts: list[tuple[Span, Tensor | None]] = []
        for span in spans:
            cache, n_rows = _own(span), span.end - span.start
            if n_rows > MAX_DECODE_ROWS or cache.length == 0 or not cache.take_seat():
                self.prompts.append((span, _causal_mask(cache.length, n_rows, group)))
                continue
            pools.setdefault((id(cache.pool), n_rows), []).append(span)
        self.seats = [
            _seats(sorted(group_, key=lambda span: _own(span).seat), n_rows, n_tokens)
            for (_, n_rows), group_ in pools.items()
        ]


def _seats(spans: Sequence[Span], n_rows: int, n_tokens: int) -> _Seats:
    """``spans`` are sequences of one pool, in the order of their seats."""
    caches = [_own(span) for span in spans]
    pool = caches[0].pool
    if pool is None:
        raise ValueError("these sequences have no seats")
    seats = torch.tensor([cache.seat for cache in caches])
    starts = torch.tensor([span.start for span in spans])
    offsets = torch.arange(n_rows)
    rows = (starts[:, None] + offsets).flatten()
    positions = torch.tensor([cache.length for cache in caches])[:, None] + offsets
    hidden = torch.arange(pool.capacity) > positions[..., None]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    in_order = len(rows) == n_tokens and torch.equal(rows, torch.arange(n_tokens))
    return _Seats(
        pool,
        None if in_order else rows,
        n_rows,
        seats[:, None].expand(-1, n_rows),
        positions,
        mask[:, None, :, None],
        whole=torch.equal(seats, torch.arange(len(seats))),
    )


def _own(span: Span) -> KVCache:
    if not isinstance(span.cache, KVCache):
        raise TypeError("this cache belongs to another model")
    return span.cache


class _Weights:
    """The file is opened for each tensor: a map that stays open keeps its pages in memory."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def stacked(self, *names: str) -> Tensor:
        """Several matrices of one input as one, so that one product computes them all."""
        return torch.cat([self[name] for name in names])


def _rotary_table(
    config: LlamaConfig, n_positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[n_positions, head_dim]`` of rotary embedding (arXiv
    2104.09864): the first half of the sines carries the minus of the rotation."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(n_positions).float(), config.rope_theta**-half)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[first, second] * cos + [-second, first] * |sin|``."""
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)


def _causal_mask(length: int, t: int, group: int) -> Tensor | None:
    """``[group * t, length + t]``, True where a row may look; None for a single row."""
    if t == 1:
        return None
    mask = torch.ones((t, length + t), dtype=torch.bool).tril(length)
    return mask.repeat(group, 1)
