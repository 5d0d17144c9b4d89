"""Finds a concept's layer, direction and threshold from a handful of sentences.

    concept = learn(Examples(ten_sentences), tokenizer, stream, Settings())
    concept.layer, concept.threshold, concept.quality.auroc

Every layer that is tried scores each text along a direction found without that text's fold. Of
the layers that keep the two sides about as far apart as the best does (within its standard
error), the one nearest to a third of the model's depth is taken: a handful of sentences is told
apart by its commonest word in the first layers, and by what it is about there. The figures
reported take, for each fold, the layer that the *other* folds chose, so that the choice does not
flatter them. Then one direction is made of all texts.

Not protected here: what a concept is. Ten sentences that share a second thing teach both; give
negatives that have only that second thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest
from fortpoint.features.concepts import background
from fortpoint.features.concepts.discriminant import (
    CrossFit,
    Doubles,
    Floats,
    Layout,
    cross_fit,
    largest,
)
from fortpoint.features.concepts.examples import Examples
from fortpoint.features.concepts.quality import Quality, auroc, measure, separation
from fortpoint.features.concepts.reading import Rows, Stream, Tokenizer, read, tokenize
from fortpoint.features.directions import Direction

Progress = Callable[[str, int, int], None]

# Chosen on eight concepts of another set than the benchmark's (benchmarks/concepts.py --dev).
_FOLDS = 5
_DEPTH = 0.35  # of the model, where a layer is sought first
_MARGIN = 0.3  # of the gap between background and positives lies below the threshold
_LOW_POSITIVES = 0.1  # quantile that counts as the lower edge of the positives


@dataclass(frozen=True)
class Settings:
    """``layers`` None tries every second one."""

    layers: tuple[int, ...] | None = None
    max_false_positive_rate: float = 0.01
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Concept:
    """A direction at ``layer``: reads ``relu(x . reader - threshold)`` at a token.

    ``writer`` is what to add to the stream for each unit of that reading; ``maximum`` the
    largest reading of a held-out positive. ``layers`` has the held-out AUROC of every layer.
    """

    layer: int
    reader: Floats
    writer: Floats
    threshold: float
    maximum: float
    quality: Quality
    layers: Mapping[int, float]

    def direction(self, name: str, model: str) -> Direction:
        """What the engine loads under this name."""
        return Direction(
            name, model, self.layer, self.reader, self.threshold, self.maximum, self.writer
        )

    def scores(self, rows: Rows, n_texts: int) -> Doubles:
        """Each text's largest ``x . reader - threshold``, ``[n_texts]``: over 0 it is found."""
        read = (rows.x @ self.reader - self.threshold).astype(np.float64)
        return largest(read, rows.text, n_texts)


def learn(
    examples: Examples,
    tokenizer: Tokenizer,
    stream: Stream,
    settings: Settings,
    progress: Progress = lambda stage, done, total: None,
) -> Concept:
    """Raises ``InvalidRequest`` where the examples have nothing in common that can be read.

    Also for a layer that is not there; ``ModelError`` for activations that are not finite.
    """
    layers = settings.layers or tuple(range(0, stream.n_layers, 2))
    own = {" ".join(text.split()) for text in (*examples.positives, *examples.negatives)}
    others = [text for text in background.sentences() if text not in own]
    texts = [*examples.positives, *examples.negatives, *others]
    layout = _layout(examples, len(texts))
    folds = _folds(layout, settings.seed)
    tokenized = tokenize(texts, tokenizer, stream.max_context)
    tried: dict[int, CrossFit] = {}
    for layer, rows in read(tokenized, stream, layers):
        tried[layer] = cross_fit(rows, layout, folds)
        progress("concept", len(tried), len(layers))
    middle = _DEPTH * (stream.n_layers - 1)
    return _choose(tried, layout, folds, middle, settings)


def _layout(examples: Examples, n_texts: int) -> Layout:
    n_positives, n_negatives = len(examples.positives), len(examples.negatives)
    at = np.arange(n_texts)
    positive = at < n_positives
    return Layout(positive, ~positive & (at < n_positives + n_negatives))


def _folds(layout: Layout, seed: int) -> NDArray[np.int64]:
    """``[n_texts]``: every kind of text is spread evenly over the folds, in a random order."""
    source = np.random.default_rng(seed)
    folds = np.empty(len(layout.positive), np.int64)
    for kind in (layout.positive, layout.negative, ~(layout.positive | layout.negative)):
        folds[kind] = source.permutation(np.arange(kind.sum()) % _FOLDS)
    return folds


def _choose(
    tried: Mapping[int, CrossFit],
    layout: Layout,
    folds: NDArray[np.int64],
    middle: float,
    settings: Settings,
) -> Concept:
    scores = {layer: tried[layer].scores for layer in sorted(tried)}
    layer = _best(scores, layout, np.ones(len(folds), bool), middle)
    honest = np.empty(len(folds))
    for number in range(int(folds.max()) + 1):
        held = folds == number
        honest[held] = scores[_best(scores, layout, ~held, middle)][held]
    threshold = _threshold(honest, layout, settings.max_false_positive_rate)
    maximum = float(honest[layout.positive].max())
    if maximum <= threshold:
        raise InvalidRequest(
            "these sentences have nothing in common that the model tells apart from other "
            "text; add examples that name the concept, or try negatives",
            param="positives",
        )
    found = tried[layer].found
    return Concept(
        layer=layer,
        reader=found.reader,
        writer=found.writer,
        threshold=found.raw(threshold),
        maximum=(maximum - threshold) * found.spread,
        quality=measure(honest[layout.positive], honest[layout.other], threshold, settings.seed),
        layers={n: auroc(row[layout.positive], row[layout.other]) for n, row in scores.items()},
    )


def _best(
    scores: Mapping[int, Doubles], layout: Layout, texts: NDArray[np.bool_], middle: float
) -> int:
    """Nearest to ``middle`` of the layers that keep positives and others among ``texts`` apart.

    The standard error of a separation d of n positives is about d / sqrt(2 n).
    """
    positive, other = layout.positive & texts, layout.other & texts
    apart = np.array([separation(row[positive], row[other]) for row in scores.values()])
    apart = _with_neighbours(apart)
    least = apart.max() * (1 - 1 / math.sqrt(2 * positive.sum()))
    good = [layer for layer, value in zip(scores, apart, strict=True) if value >= least]
    return min(good or scores, key=lambda layer: abs(layer - middle))


def _with_neighbours(values: Doubles) -> Doubles:
    """Each value's mean with those beside it: ten texts make a single layer's figure jump."""
    padded = np.pad(values, 1, mode="edge")
    smooth: Doubles = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return smooth


def _threshold(scores: Doubles, layout: Layout, max_rate: float) -> float:
    """At most ``max_rate`` of the other texts are over it; further up where there is room."""
    others = np.sort(scores[layout.other])
    allowed = int(max_rate * len(others))
    floor = float(others[len(others) - 1 - allowed])
    edge = float(np.quantile(scores[layout.positive], _LOW_POSITIVES))
    return floor + _MARGIN * max(0.0, edge - floor)
