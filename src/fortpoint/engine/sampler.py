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
for a core that a neighbour holds.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fortpoint.engine.protocol import Sampling
from fortpoint.errors import EngineError, FortPointError

Row = npt.NDArray[np.float32]

MAX_LOGPROBS = 5
_GREEDY_BELOW = 1e-5
_LIKELY = np.float32(1e-4)  # of the likeliest token's probability: nearly all nuclei end above it
_DECIMALS = 2


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

    def choose(self, row: Row) -> Chosen:
        """The next token by ``row`` ``[vocab]``, which stays as it is. Raises ``EngineError``."""
        scores = row
        if self.seen is not None or self.grammar is not None:
            scores = row.copy()
        if self.seen is not None:
            self.seen.penalise(scores, self.sampling)
        if self.grammar is not None:
            self.grammar.mask(scores)
        token = _pick(scores, self.sampling, self.source)
        if self.seen is not None:
            self.seen.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        if self.sampling.logprobs is None:
            return Chosen(token)
        return _with_logprobs(token, row, min(self.sampling.logprobs, MAX_LOGPROBS))


def choose(logits: Tensor, states: Sequence[Sampler]) -> list[Chosen | FortPointError]:
    """The next token of each row of ``logits`` ``[n, vocab]`` (float32, finite).

    Takes note of it in the row's state. A row that has no next token gets its own error, and
    the others go on.
    """
    with np.errstate(over="ignore"):  # huge logits: what is infinitely unlikely has weight 0
        return [_attempt(row, state) for row, state in zip(logits.numpy(), states, strict=True)]


def sample(logits: Tensor, sampling: Sampling, source: torch.Generator) -> int:
    """One token id by ``logits`` ``[vocab]``, by temperature and the kept set alone."""
    return _pick(logits.numpy(), sampling, source)


def generator(seed: int | None, choice: int) -> torch.Generator:
    """A source of randomness of one answer: the same seed and choice give the same answer."""
    made = torch.Generator()
    base = secrets.randbits(63) if seed is None else seed
    made.manual_seed((base + choice * 0x9E3779B97F4A7C15) % 2**63)
    return made


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


def _attempt(row: Row, state: Sampler) -> Chosen | FortPointError:
    try:
        return state.choose(row)
    except FortPointError as error:
        return error


def _pick(row: Row, sampling: Sampling, source: torch.Generator) -> int:
    """One token id; at temperature 0 the first of the largest."""
    likeliest = int(row.argmax())
    if row[likeliest] == -np.inf:
        raise EngineError("no token of this model fits the schema here; try another schema")
    if sampling.temperature < _GREEDY_BELOW:
        return likeliest
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
    at = len(values) - k
    return np.float32(np.partition(values, at)[at])


def _end_of_nucleus(weights: Row, top_p: float) -> np.float32:
    """The smallest weight among the fewest that make up ``top_p`` of the sum of all.

    The largest weight is 1. Sorting the likely ones is nearly always enough.
    """
    wanted = top_p * float(weights.sum(dtype=np.float64))
    for likely in (weights[weights >= _LIKELY], weights):
        ordered = np.sort(likely)[::-1]
        mass = _cumulated(ordered)
        if mass[-1] >= wanted:
            break
    end = min(int(np.searchsorted(mass, wanted)), len(ordered) - 1)
    return np.float32(ordered[end])


def _cumulated(weights: Row) -> npt.NDArray[np.float64]:
    """Sums of the first one, two, ... weights; torch's are four times as fast as numpy's."""
    return torch.from_numpy(weights.copy()).cumsum(0, dtype=torch.float64).numpy()


def _draw(weights: Row, source: torch.Generator) -> int:
    """An index with probability proportional to its weight; never one of weight 0."""
    mass = _cumulated(weights)
    drawn = float(torch.rand((), dtype=torch.float64, generator=source)) * mass[-1]
    last = np.searchsorted(mass, mass[-1], side="left")
    return int(min(np.searchsorted(mass, drawn, side="right"), last))


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
