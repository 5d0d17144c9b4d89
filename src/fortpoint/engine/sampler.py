"""Choose the next token of every row of a step from its logits.

Each row goes alone through the same arithmetic, so its result never depends on its
neighbours. The order is that of transformers' ``GenerationMixin``: repetition penalty
(arXiv 1909.05858), frequency and presence penalty (OpenAI's formula), the grammar's mask,
temperature, ``top_k`` (arXiv 1805.04833), ``top_p`` (arXiv 1904.09751), ``min_p``
(arXiv 2407.01082), and one draw from what is left. Each of the three keeps what is at least
as likely as its last kept token, so ties at the edge stay.

    states = [Sampler(sampling, choice=0, prompt_tokens=prompt)]
    [chosen] = choose(logits, states)

numpy does the work: on rows of this size its single thread beats torch's, and it never waits
for a core that a neighbour holds. Rows that are merely greedy cost one ``argmax``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fortpoint.engine.protocol import Sampling
from fortpoint.errors import EngineError, FortPointError

Row = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float32]

MAX_LOGPROBS = 5
_GREEDY_BELOW = 1e-5
_LIKELY = np.float32(1e-4)  # of the likeliest token's probability: nearly all nuclei end above it
_DECIMALS = 2
_BLOCK = 256  # values whose sum or maximum is taken first, so that few are left to look at


class Constraint(Protocol):
    """What an answer may still become, such as JSON of a schema."""

    def mask(self, row: Row) -> None:
        """Set the logits ``[vocab]`` of tokens that may not come next to -inf, in place."""

    def accept(self, token: int) -> None:
        """``token`` came next."""


@dataclass(frozen=True)
class Chosen:
    """One token id. ``logprob`` and ``top`` (likeliest first) only where asked for.

    They are natural-log probabilities of the model's own distribution, before penalties,
    grammar and temperature, rounded to two decimals (the extraction policy).
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None


class Sampler:
    """What one answer's choices depend on beside the logits. Belongs to the compute thread."""

    def __init__(
        self,
        sampling: Sampling,
        choice: int,
        prompt_tokens: Sequence[int],
        grammar: Constraint | None = None,
    ) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self.source = generator(sampling.seed, choice)
        self.seen: _Seen | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = _Seen(prompt_tokens)
        elif sampling.presence_penalty or sampling.frequency_penalty:
            self.seen = _Seen(())
        self._free = self.seen is None and grammar is None
        self._greedy = sampling.temperature < _GREEDY_BELOW
        self._plain = self._free and self._greedy and sampling.logprobs is None

    def choose(self, row: Row, likeliest: int) -> Chosen:
        """The next token by ``row`` ``[vocab]``, which stays as it is. Raises ``EngineError``.

        ``likeliest`` is the first of the row's largest.
        """
        if self._plain:
            return Chosen(likeliest)
        scores = row
        if not self._free:
            scores = row.copy()
            self._adjust(scores)
            likeliest = int(scores.argmax())
            if scores[likeliest] == -np.inf:
                raise EngineError("no token of this model fits the schema here; try another schema")
        token = likeliest if self._greedy else _pick(scores, likeliest, self.sampling, self.source)
        self._note(token)
        if self.sampling.logprobs is None:
            return Chosen(token)
        return _with_logprobs(token, row, min(self.sampling.logprobs, MAX_LOGPROBS))

    def _adjust(self, scores: Row) -> None:
        if self.seen is not None:
            self.seen.penalise(scores, self.sampling)
        if self.grammar is not None:
            self.grammar.mask(scores)

    def _note(self, token: int) -> None:
        if self.seen is not None:
            self.seen.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)


def choose(
    logits: Rows, states: Sequence[Sampler], likeliest: npt.NDArray[np.intp] | None = None
) -> list[Chosen | FortPointError]:
    """The next token of each row of ``logits`` ``[n, vocab]`` (finite).

    Takes note of it in the row's state. A row that has no next token gets its own error, and
    the others go on. ``likeliest`` ``[n]`` is each row's argmax, where it is known already.
    """
    if likeliest is None:
        likeliest = logits.argmax(axis=1)
    with np.errstate(over="ignore"):  # huge logits: what is infinitely unlikely has weight 0
        return [
            _attempt(state, row, top)
            for row, state, top in zip(logits, states, likeliest.tolist(), strict=True)
        ]


def generator(seed: int | None, choice: int) -> np.random.Generator:
    """A source of randomness of one answer: the same seed and choice give the same answer.

    Philox (Salmon et al., SC 2011) keyed with both, so that no two answers share a stream.
    """
    base = secrets.randbits(64) if seed is None else seed % 2**64
    return np.random.Generator(np.random.Philox(key=base + (choice << 64)))


class _Seen:
    """The tokens that penalties look at, and how often the answer has each."""

    def __init__(self, prompt_tokens: Iterable[int]) -> None:
        self._slots = {token: i for i, token in enumerate(dict.fromkeys(prompt_tokens))}
        self._tokens = np.array(list(self._slots), dtype=np.int64)
        self._counts = np.zeros(len(self._slots), dtype=np.float32)

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            self._tokens = np.append(self._tokens, token)
            self._counts = np.append(self._counts, np.float32(0))
        self._counts[slot] += 1

    def penalise(self, row: Row, sampling: Sampling) -> None:
        """Lower the logits ``row`` ``[vocab]`` of seen tokens, in place."""
        logits, factor = row[self._tokens], np.float32(sampling.repetition_penalty)
        logits = np.where(logits > 0, logits / factor, logits * factor)
        logits -= np.float32(sampling.frequency_penalty) * self._counts
        logits -= np.float32(sampling.presence_penalty) * (self._counts > 0)
        row[self._tokens] = logits


def _attempt(state: Sampler, row: Row, likeliest: int) -> Chosen | FortPointError:
    try:
        return state.choose(row, likeliest)
    except FortPointError as error:
        return error


def _pick(row: Row, likeliest: int, sampling: Sampling, source: np.random.Generator) -> int:
    """One token id, drawn from what temperature and the kept set leave."""
    scaled = row - row[likeliest]
    scaled /= np.float32(sampling.temperature)
    weights = np.exp(scaled, out=scaled)  # the likeliest token's is 1
    kept: npt.NDArray[np.int64] | None = None
    if 0 < sampling.top_k < len(weights):
        kept = np.flatnonzero(weights >= _largest(weights, sampling.top_k))
        weights = weights[kept]
    least = np.float32(sampling.min_p)
    if sampling.top_p < 1.0:
        least = max(least, _end_of_nucleus(weights, sampling.top_p))
    if least > 0:
        within = np.flatnonzero(weights >= least)
        kept, weights = within if kept is None else kept[within], weights[within]
    drawn = _draw(weights, source)
    return drawn if kept is None else int(kept[drawn])


def _largest(values: Row, k: int) -> np.float32:
    """The ``k``-th largest value."""
    n_blocks = len(values) // _BLOCK
    if k <= n_blocks:  # no less than the k-th largest of the blocks' maxima: few are left
        starts = np.arange(0, n_blocks * _BLOCK, _BLOCK)
        maxima = np.maximum.reduceat(values, starts)
        values = values[values >= np.partition(maxima, n_blocks - k)[n_blocks - k]]
    at = len(values) - k
    return np.float32(np.partition(values, at)[at])


def _end_of_nucleus(weights: Row, top_p: float) -> np.float32:
    """The smallest weight among the fewest that make up ``top_p`` of the sum of all.

    The largest weight is 1. Sorting the likely ones is nearly always enough.
    """
    wanted = top_p * float(weights.sum(dtype=np.float64))
    for likely in (weights[weights >= _LIKELY], weights):
        ordered = np.sort(likely)[::-1]
        mass = ordered.cumsum(dtype=np.float64)
        if mass[-1] >= wanted:
            break
    end = min(int(np.searchsorted(mass, wanted)), len(ordered) - 1)
    return np.float32(ordered[end])


def _draw(weights: Row, source: np.random.Generator) -> int:
    """An index with probability proportional to its weight; never one of weight 0.

    First a block of weights by the blocks' sums, then one within it.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float32)
    block, rest = _locate(sums, source.random())
    start = block * _BLOCK
    within, _ = _locate(weights[start : start + _BLOCK], rest)
    return start + within


def _locate(weights: Row, share: float) -> tuple[int, float]:
    """Where ``share`` (0 to 1) of the sum is reached, and how far into that weight (0 to 1)."""
    mass = weights.cumsum(dtype=np.float64)
    wanted = share * mass[-1]
    last = np.searchsorted(mass, mass[-1], side="left")
    index = int(min(np.searchsorted(mass, wanted, side="right"), last))
    before = float(mass[index - 1]) if index else 0.0
    return index, min(max((wanted - before) / float(weights[index]), 0.0), 1.0)


def _with_logprobs(token: int, row: Row, n_top: int) -> Chosen:
    largest = row.max()
    log_sum = float(largest) + math.log(np.exp(row - largest).sum(dtype=np.float64))
    top: list[int] = []
    if n_top:
        likely = np.flatnonzero(row >= _largest(row, min(n_top, len(row))))
        order = np.lexsort((likely, -row[likely]))
        top = likely[order][:n_top].tolist()

    def logprob(index: int) -> float:
        return round(float(row[index]) - log_sum, _DECIMALS) + 0.0  # never -0.0

    return Chosen(token, logprob(token), tuple((index, logprob(index)) for index in top))
