"""A tokenizer and a residual stream of a few words, some of which are about a bridge."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from fortpoint.engine.chat import Prompt
from fortpoint.errors import InvalidRequest
from fortpoint.features.concepts import background
from fortpoint.types import Message

D = 24
N_LAYERS = 8
BEST_LAYER = 3
CONTEXT = 64

BRIDGE = ("bridge", "tower", "cable")


class Words:
    """A token for each word, the line break before a text one of them."""

    def text(self, text: str) -> Prompt:
        words = text.replace("\n", "<br> ").split()
        return Prompt(tuple(map(token_of, words)), ())

    def chat(self, messages: Sequence[Message]) -> Prompt:
        raise NotImplementedError

    def decode(self, tokens: Sequence[int]) -> str:
        raise NotImplementedError


class World:
    """Each word's random vector; at ``BEST_LAYER`` bridge words lie furthest along one axis.

    The first token of a text is a sink. The second axis varies widely and says nothing.
    """

    d_model = D
    n_layers = N_LAYERS
    max_context = CONTEXT

    def __init__(self, broken_layer: int | None = None, strength: float = 10.0) -> None:
        self.broken_layer = broken_layer
        self.strength = strength
        self.n_reads = 0

    def check_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if not 0 <= layer < N_LAYERS:
                raise InvalidRequest(f"there is no layer {layer}; this model has 0 to 7")

    def read(self, sequences: Sequence[Sequence[int]], layers: Sequence[int]):
        self.n_reads += 1
        return {layer: self._layer(sequences, layer) for layer in layers}

    def _layer(self, sequences: Sequence[Sequence[int]], layer: int) -> np.ndarray:
        rows = [
            self._row(token, layer, number, place)
            for number, tokens in enumerate(sequences)
            for place, token in enumerate(tokens)
        ]
        x = np.array(rows, np.float32)
        if layer == self.broken_layer:
            x[3, 0] = np.nan
        return x

    def _row(self, token: int, layer: int, number: int, place: int) -> np.ndarray:
        x = np.random.default_rng(token).standard_normal(D)
        x[1] += 8 * np.random.default_rng((number, place)).standard_normal()
        if token % 2000 >= 1000:
            x[0] += self.strength / (1 + abs(layer - BEST_LAYER))
            x[1] += 2.0
        return x * (1000.0 if place == 0 else 1.0)


def token_of(word: str) -> int:
    about = word.strip(".").lower() in BRIDGE
    return 2000 * (2 + zlib.crc32(word.encode()) % 500) + 1000 * about


def sentence(n: int, about: str | None = None) -> str:
    """Seven words as other text has them, different for every ``n``."""
    source = np.random.default_rng(n)
    known = " ".join(background.sentences()).split()
    words = [known[i] for i in source.integers(0, len(known), 7)]
    if about is not None:
        words[int(source.integers(0, 7))] = about
    return " ".join(words)


POSITIVES = tuple(sentence(n, BRIDGE[n % 3]) for n in range(10))
