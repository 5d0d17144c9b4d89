"""What the runner needs of a model, whoever computes it.

Rows are tokens of any sequences, flattened: a prompt's chunk is many rows of one sequence, a
decode step is one row of each. A ``Span`` says which rows are whose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from fortpoint.engine.kv_cache import KVBudget

Hook = Callable[[int, Tensor], Tensor | None]
"""``hook(layer, x)`` sees the residual stream ``[n_rows, d_model]`` after each block and
returns a changed copy to go on with, or None for no change (never ``x`` changed in place)."""


class Cache(Protocol):
    """What one sequence has computed; ``length`` tokens of it."""

    length: int

    def reserve(self, n_tokens: int) -> bool:
        """Make room for ``n_tokens`` in all; False (and no change) when memory is spent."""

    def fork(self) -> Cache | None:
        """A copy of what is filled; None when memory is spent."""

    def release(self) -> None:
        """Give the memory back; the cache is empty afterwards."""


class Adapter(Protocol):
    """A LoRA adapter that fits the model."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``end`` are the next tokens of one sequence."""

    cache: Cache
    start: int
    end: int
    adapter: Adapter | None = None


@runtime_checkable
class Model(Protocol):
    """Weights and the forward pass. Not thread-safe: one thread computes."""

    max_context: int

    @property
    def architecture(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def d_model(self) -> int: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def kv_bytes_per_token(self) -> int: ...

    def cache(self, budget: KVBudget) -> Cache:
        """An empty cache for one sequence, which takes its memory from ``budget``."""

    def forward(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        hook: Hook | None = None,
        until_layer: int | None = None,
    ) -> Tensor:
        """Advance every span's sequence by its rows; return the residual stream.

        ``tokens`` is ``[n_rows]``; every cache has room for its rows. ``until_layer`` stops
        after that block (0-based), inclusive. Returns ``[n_rows, d_model]``, before the final
        norm.
        """

    def normed(self, x: Tensor) -> Tensor:
        """The residual stream ``[n, d_model]`` after the final norm."""

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream ``[n, d_model]`` to logits ``[n, vocab]`` in float32."""
