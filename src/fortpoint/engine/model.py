"""What the runner needs of a model, whoever computes it.

Rows are tokens of any sequences, flattened: a prompt's chunk is many rows of one sequence, a
decode step is one row of each. A ``Span`` says which rows are whose, in order and without
gaps. The residual stream is read (``seen``) and changed (``edits``) in the same pass.

    result = model.forward(Step(tokens, spans, logit_rows=[4, 5], tap_layers=(9, 15)))
    result.logits  # [2, vocab_size]

What a row gets does not depend on the rows beside it: neither on neighbours in the batch nor
on how its prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fortpoint.engine.steering import Edits

Floats = NDArray[np.float32]


class Cache(Protocol):
    """Keys and values of one sequence; the first ``length`` tokens are computed.

    The model's memory for all caches is limited; who gets no room must wait or give way.
    """

    @property
    def length(self) -> int: ...

    def reserve(self, n_tokens: int) -> bool:
        """Make room for ``n_tokens`` in all; False (and no change) when memory is spent."""

    def fork(self) -> Cache | None:
        """A copy of what is computed, sharing what it can; None when memory is spent."""

    def release(self) -> None:
        """Give the memory back; the cache is empty afterwards."""

    def adopt(self, tokens: Sequence[int], salt: str) -> Floats | None:
        """Take over what was published for the longest known beginning of ``tokens``.

        Only an empty cache adopts. At least the last token stays to be computed. Returns the
        rows that were published with it ``[length, n]``; None when nothing is known.
        """

    def publish(self, tokens: Sequence[int], salt: str, rows: Floats) -> None:
        """Let others with the same ``salt`` adopt the computed beginning of ``tokens``.

        ``rows`` ``[>= length, n]`` is kept along: what is always read at these tokens.
        """


class Adapter(Protocol):
    """A LoRA adapter that fits the model."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``end`` are the next tokens of one sequence, whose cache has room."""

    cache: Cache
    start: int
    end: int
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Step:
    """What to compute in one pass.

    ``tokens`` is ``[n_rows]``. ``tap_layers`` are the layers whose residual stream is kept,
    ``edits`` how it is changed on the way. ``last_layer`` stops after that block (0-based),
    inclusive; then there are no logits.
    """

    tokens: Sequence[int]
    spans: Sequence[Span]
    logit_rows: Sequence[int] = ()
    tap_layers: Sequence[int] = ()
    edits: Edits | None = None
    last_layer: int | None = None


@dataclass(frozen=True)
class Result:
    """What came of a step. The arrays are overwritten by the next one: copy what is kept.

    ``residual`` is ``[n_rows, d_model]`` after the last block computed, before the final
    norm; ``logits`` ``[len(logit_rows), vocab_size]``; ``seen`` maps each tap layer to
    ``[n_rows, d_model]`` after that block and its edits. A row with values that are not finite
    is the caller's to find.
    """

    residual: Floats
    logits: Floats
    seen: Mapping[int, Floats]


@runtime_checkable
class Model(Protocol):
    """Weights and the forward pass. Not thread-safe: one thread calls it."""

    @property
    def architecture(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def d_model(self) -> int: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence: what the model knows, and what its memory holds."""

    def new_cache(self) -> Cache:
        """An empty cache for one sequence."""

    def forward(self, step: Step) -> Result:
        """Advance every span's sequence by its rows."""

    def normed(self, x: Floats) -> Floats:
        """The residual stream ``[n, d_model]`` after the final norm."""

    def close(self) -> None:
        """End the threads that the model started."""
