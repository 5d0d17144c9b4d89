"""Residual streams of short texts, token by token, without what no concept should be read from.

Each text is read as plain text behind a line break, which becomes the sink in its first word's
place. Inside a chat's template the same directions and thresholds hold (benchmarks/concepts.py),
and the template would be four fifths of the tokens. Tokens of outsized norm are left out too.

    texts = tokenize(["The bridge is red.", "It rains."], tokenizer, stream.max_context)
    for layer, rows in read(texts, stream, layers=(8, 12)):
        rows.x, rows.text  # [n, d_model], and which text each row is of
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.features import harvest
from fortpoint.features.corpus import Prompted

Floats = NDArray[np.float32]

SINK_NORM = 10.0
"""In medians: a token whose norm is beyond is a sink."""

_MAX_BYTES = 512 << 20  # of activations held at once


class Stream(harvest.Stream, Protocol):
    """What is needed of the engine's ``ResidualStream``."""

    @property
    def n_layers(self) -> int: ...


class Tokenizer(Protocol):
    """What is needed of the engine's ``ChatTokenizer``."""

    def text(self, text: str) -> Prompted: ...


@dataclass(frozen=True, eq=False)
class Tokenized:
    """``sequences`` are what the model reads; ``read`` are booleans, True where we do too."""

    sequences: tuple[tuple[int, ...], ...]
    read: tuple[NDArray[np.bool_], ...]

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, eq=False)
class Rows:
    """``x`` is ``[n, d_model]``; ``text`` ``[n]``, ascending, says which text a row is of."""

    x: Floats
    text: NDArray[np.int64]


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, max_context: int) -> Tokenized:
    """Raises ``InvalidRequest`` for a text that the model's context cannot hold."""
    sequences, kept = [], []
    for text in texts:
        tokens = tokenizer.text("\n" + text).tokens
        if len(tokens) > max_context:
            raise InvalidRequest(
                f"{text[:40]!r} has {len(tokens)} tokens, the model's context holds "
                f"{max_context}; shorten it"
            )
        read = np.arange(len(tokens)) > 0
        if not read.any():
            raise InvalidRequest(f"{text[:40]!r} has no tokens to read")
        sequences.append(tuple(tokens))
        kept.append(read)
    return Tokenized(tuple(sequences), tuple(kept))


def read(texts: Tokenized, stream: Stream, layers: Sequence[int]) -> Iterator[tuple[int, Rows]]:
    """Layer by layer, in the order of ``layers``; as many are computed at once as memory bears.

    Raises ``InvalidRequest`` for a layer that is not there and ``ModelError`` for activations
    that are not finite.
    """
    stream.check_layers(layers)
    n_tokens = sum(map(len, texts.sequences))
    at_once = max(1, _MAX_BYTES // max(1, n_tokens * stream.d_model * 4))
    kept = np.concatenate(texts.read)
    text = np.repeat(np.arange(len(texts)), [len(one) for one in texts.sequences])[kept]
    for start in range(0, len(layers), at_once):
        group = layers[start : start + at_once]
        seen = stream.read(texts.sequences, group)
        for layer in group:
            yield layer, _sound(seen.pop(layer)[kept], text, layer)


def _sound(x: Floats, text: NDArray[np.int64], layer: int) -> Rows:
    """Without sinks, unless they are all that a text has."""
    if not np.isfinite(x).all():
        raise ModelError(
            f"the activations of layer {layer} are not finite: the model is damaged, or its "
            "precision too low"
        )
    norms = np.linalg.norm(x, axis=1)
    sound = norms <= SINK_NORM * np.median(norms)
    others = np.bincount(text[sound], minlength=int(text[-1]) + 1)
    sound |= others[text] == 0
    return Rows(x[sound], text[sound])
