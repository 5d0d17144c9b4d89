"""Reads a whole model's residual stream over many texts, and what a change of it costs.

For harvesting and for evaluation, on an engine of the operator's own: what is read here leaves
as raw activations, which the serving engine never gives out.

    stream = ResidualStream(load_model(folder, config))
    stream.read([[1, 2, 3], [4, 5]], layers=(15,))[15]  # [5, d_model]
    stream.losses([[1, 2, 3]], layer=15, replace=lambda x, positions: decode(encode(x)))  # [2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.model import Cache, Floats, Model, Span, Step
from fortpoint.engine.steering import Edits
from fortpoint.errors import EngineError, InvalidRequest

Replace = Callable[[Floats, NDArray[np.int64]], Floats]
"""``x`` ``[n_tokens, d_model]`` and each token's position in its text, to what takes its place."""

_MAX_ROWS = 512


class ResidualStream:
    """``model`` is used by this object alone, in the thread that calls."""

    def __init__(self, model: Model, max_rows: int = _MAX_ROWS) -> None:
        self._model = model
        self._max_rows = max_rows

    @property
    def d_model(self) -> int:
        return self._model.d_model

    @property
    def n_layers(self) -> int:
        return self._model.n_layers

    @property
    def max_context(self) -> int:
        return self._model.max_context

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises ``InvalidRequest`` for a layer that the model does not have."""
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise InvalidRequest(
                    f"there is no layer {layer}; this model has 0 to {self.n_layers - 1}",
                    param="layer",
                )

    def read(self, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Floats]:
        """After each of ``layers``: ``[n_tokens, d_model]``, all sequences in their order.

        The pass ends with the last layer asked for. Raises ``InvalidRequest`` for a layer that
        is not there and for a sequence that is empty or longer than the context.
        """
        self.check_layers(layers)
        parts: dict[int, list[Floats]] = {layer: [] for layer in layers}
        for group in self._groups(sequences):
            for layer, rows in self._read(group, sorted(layers)).items():
                parts[layer].append(rows)
        empty = np.empty((0, self.d_model), np.float32)
        return {layer: np.concatenate([empty, *parts[layer]]) for layer in layers}

    def losses(
        self,
        sequences: Sequence[Sequence[int]],
        layer: int | None = None,
        replace: Replace | None = None,
    ) -> Floats:
        """Negative log-likelihood in nats of every token that has one before it.

        With ``replace``, the stream after ``layer`` is what ``replace`` makes of it. The result
        is ``[sum of len(sequence) - 1]``, all sequences in their order.
        """
        if (layer is None) != (replace is None):
            raise ValueError("layer and replace go together")
        self.check_layers(() if layer is None else (layer,))
        found = [np.empty(0, np.float32)]
        for group in self._groups(sequences):
            edits = None
            if layer is not None and replace is not None:
                x = self._read(group, (layer,))[layer]
                positions = np.concatenate([np.arange(len(tokens)) for tokens in group])
                edits = Edits.adding(layer, replace(x, positions) - x)
            found.append(self._losses(group, edits))
        return np.concatenate(found)

    def _groups(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Sequences in order, as many at a time as one step takes."""
        group: list[Sequence[int]] = []
        n_rows = 0
        for sequence in sequences:
            if not 1 <= len(sequence) <= self.max_context:
                raise InvalidRequest(
                    f"a text has {len(sequence)} tokens; here it must be 1 to {self.max_context}"
                )
            if group and n_rows + len(sequence) > self._max_rows:
                yield group
                group, n_rows = [], 0
            group.append(sequence)
            n_rows += len(sequence)
        if group:
            yield group

    def _read(self, group: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Floats]:
        with ExitStack() as stack:
            step = self._step(group, stack, tap_layers=layers, last_layer=max(layers))
            return {layer: rows.copy() for layer, rows in self._model.forward(step).seen.items()}

    def _losses(self, group: Sequence[Sequence[int]], edits: Edits | None) -> Floats:
        rows: list[int] = []
        targets: list[int] = []
        start = 0
        for tokens in group:
            rows += range(start, start + len(tokens) - 1)
            targets += tokens[1:]
            start += len(tokens)
        if not rows:
            return np.empty(0, np.float32)
        with ExitStack() as stack:
            step = self._step(group, stack, logit_rows=rows, edits=edits)
            logits = self._model.forward(step).logits
        peaks = logits.max(axis=1)
        total = np.exp(logits - peaks[:, None]).sum(axis=1)
        chosen = logits[np.arange(len(rows)), np.array(targets)]
        losses: Floats = np.log(total) + peaks - chosen
        return losses

    def _step(
        self,
        group: Sequence[Sequence[int]],
        stack: ExitStack,
        tap_layers: Sequence[int] = (),
        last_layer: int | None = None,
        logit_rows: Sequence[int] = (),
        edits: Edits | None = None,
    ) -> Step:
        spans, start = [], 0
        for tokens in group:
            cache = self._room(len(tokens), stack)
            spans.append(Span(cache, start, start + len(tokens)))
            start += len(tokens)
        every = [token for sequence in group for token in sequence]
        return Step(every, spans, logit_rows, tap_layers, edits, last_layer)

    def _room(self, n_tokens: int, stack: ExitStack) -> Cache:
        cache = self._model.new_cache()
        stack.callback(cache.release)
        if not cache.reserve(n_tokens):
            raise EngineError("the model's memory is too small for these texts (kv_cache_mib)")
        return cache
