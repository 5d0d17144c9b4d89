"""A job is one request; a sequence is one run of tokens that it needs computed.

A generation with ``n`` answers is one sequence while its prompt is read, then ``n``. A
preempted sequence loses its cache, keeps its tokens, and is computed again later.

What may be shared: a prompt that the request's own steering touches is nobody else's. A request
that watches features adopts nothing before its prompt is read, since all of it must be. The
salt keeps tenants apart (how fast an answer comes would tell one what another asked), and
adapters, whose keys and values differ.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.chat import Prompt
from fortpoint.engine.detokenizer import Detokenizer
from fortpoint.engine.grammar import Grammar
from fortpoint.engine.model import Adapter, Cache, Floats
from fortpoint.engine.protocol import Embed, Event, Failed, Generate, Scan, ScoreText, Watch
from fortpoint.engine.sampler import Sampler
from fortpoint.engine.steering import Plan
from fortpoint.engine.taps import Part
from fortpoint.errors import FortPointError

SCORED_ROWS = 32
"""Most rows a step whose logits are scored: each is a vocabulary wide."""

_HEADROOM = 16
_COMMON = 64  # tokens in common that are worth a moment's wait

Asked = Generate | Scan | Embed | ScoreText


class Sent(NamedTuple):
    """An event on its way to whoever waits for ``job``."""

    job: Job
    event: Event


class Outbox:
    """Gathers a step's events, so that they cross to the event loop together."""

    def __init__(self, deliver: Callable[[list[Sent]], object]) -> None:
        self._deliver = deliver
        self._sent: list[Sent] = []

    def put(self, job: Job, event: Event) -> None:
        self._sent.append(Sent(job, event))

    def flush(self) -> None:
        if self._sent:
            sent, self._sent = self._sent, []
            self._deliver(sent)


@dataclass(eq=False)
class Job:
    """One request, what it was prepared into (all set before it is submitted), and how far it is.

    ``continuation`` are the tokens that are scored after the only prompt. Belongs to the
    compute thread once submitted; ``number`` is its place in the order of arrival.
    """

    request: Asked
    prompts: tuple[Prompt, ...] = ()
    continuation: tuple[int, ...] = ()
    plan: Plan | None = None
    adapter: Adapter | None = None
    grammar: Grammar | None = None
    number: int = -1
    outbox: Outbox | None = None
    proceeding: bool = False
    ended: bool = False
    n_open: int = 0
    n_completion_tokens: int = 0
    vectors: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = self.request
        self.tenant = request.tenant if isinstance(request, Generate | ScoreText) else ""
        self.watch: Watch | None = request.watch if isinstance(request, Generate) else None
        self.is_scan = isinstance(request, Scan)
        self.is_score = isinstance(request, ScoreText)
        self.is_embedding = isinstance(request, Embed)
        self.is_generation = isinstance(request, Generate)

    @cached_property
    def n_prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @cached_property
    def salt(self) -> str:
        """Who may share: the tenant's length keeps it apart from the adapter's name."""
        adapter = "" if self.adapter is None else self.adapter.name
        return f"prefix:{len(self.tenant)}:{self.tenant}{adapter}"

    @cached_property
    def shares(self) -> bool:
        """Its prompt's keys and values are what anybody's would be.

        A scan's are not (its last layers are not computed), an embedding needs every token's
        residual.
        """
        unsteered = self.plan is None or not self.plan.touches_prompt
        return unsteered and not (self.is_scan or self.is_embedding)

    @cached_property
    def shares_answer(self) -> bool:
        return self.shares and (self.plan is None or not self.plan.changes)

    def send(self, event: Event, *, last: bool = False) -> None:
        """Nothing follows the last event."""
        if not self.ended and self.outbox is not None:
            self.ended = last
            self.outbox.put(self, event)

    def fail(self, error: FortPointError) -> None:
        self.send(Failed(self.request.id, error.code, error.message), last=True)


@dataclass(eq=False)
class Answer:
    """How a sequence goes on after its prompt."""

    sampler: Sampler
    text: Detokenizer
    grammar: Grammar | None


@dataclass(eq=False)
class Sequence:
    """``tokens`` is prompt and answer; the first ``cache.length`` of them are computed.

    ``index`` is the answer's number in a generation, the text's number in an embedding.
    ``read`` has what was read at the tokens computed so far, ``newest`` at the last of them.
    ``first_logits`` ``[vocab]`` waits, while ``parked``, for leave to answer. ``pooled`` is an
    embedding's sum ``[d_model]``, ``logprobs`` the scored tokens' so far.
    """

    job: Job
    index: int
    prompt: Prompt
    cache: Cache
    tokens: list[int]
    answer: Answer | None = None
    parked: bool = False
    charged: bool = False
    published: bool = False
    first_logits: Floats | None = None
    read: list[Part] = field(default_factory=list)
    newest: Part | None = None
    pooled: NDArray[np.float64] | None = None
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.prompt.tokens)

    @property
    def age(self) -> tuple[int, int]:
        """Sorts the older before the younger."""
        return (self.job.number, self.index)

    @property
    def n_missing(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return len(self.tokens) - self.cache.length

    @property
    def n_answer(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def decodes(self) -> bool:
        """One row a step: only the newest token of the answer is missing."""
        return self.answer is not None and len(self.tokens) - self.cache.length == 1

    @property
    def reads_prompt(self) -> bool:
        """It has tokens to catch up on."""
        return not self.parked and not self.decodes and self.n_missing > 0

    @property
    def first_scored(self) -> int:
        """The first position whose logits are scored."""
        return max(self.n_prompt - 1, 0)

    @property
    def scores(self) -> bool:
        """The logits of its next rows are wanted, all of them."""
        return self.job.is_score and self.cache.length >= self.first_scored

    @property
    def n_next(self) -> int:
        """Rows that the next step may compute."""
        if not self.job.is_score or self.scores:
            return self.n_missing
        return self.first_scored - self.cache.length

    @property
    def n_wanted(self) -> int:
        """Tokens to have room for before it begins: some of the answer, too.

        Without them, the first steps of its answer would take its neighbours' room.
        """
        request = self.job.request
        if not isinstance(request, Generate):
            return len(self.tokens)
        return len(self.tokens) + min(request.sampling.max_tokens - self.n_answer, _HEADROOM)

    @property
    def may_adopt(self) -> bool:
        return self.job.shares and (self.job.watch is None or self.answer is not None)

    def awaits(self, other: Sequence) -> bool:
        """``other`` will soon publish what this one can adopt."""
        if other.published or not (self.may_adopt and other.job.shares):
            return False
        if self.n_prompt < _COMMON or self.job.salt != other.job.salt:
            return False
        return self.tokens[:_COMMON] == other.tokens[: min(_COMMON, other.n_prompt)]

    def adopt(self) -> None:
        """Take over what is known of its beginning, if it may."""
        if not self.may_adopt:
            return
        whole = self.job.shares_answer and not self.job.is_score
        known = self.tokens if whole else self.tokens[: self.n_prompt]
        rows = self.cache.adopt(known, self.job.salt) if len(known) > 1 else None
        if rows is not None:
            self.read = [Part(rows)]

    def publish(self, n_tokens: int) -> None:
        """Let others adopt the first ``n_tokens``, with what was read there."""
        if not self.read:
            return
        rows = self.logits_read()[:n_tokens]
        if len(rows) == n_tokens <= self.cache.length:
            self.cache.publish(self.tokens[:n_tokens], self.job.salt, rows)

    def logits_read(self) -> Floats:
        """What is always read (``Part.logits``) at the tokens computed so far."""
        return np.concatenate([part.logits for part in self.read])

    def evict(self) -> None:
        """Give up all that was computed; the tokens stay, to be computed again."""
        self.cache.release()
        self.read = []
        self.pooled = None
        self.logprobs = []
        self.published = False


def total(sequences: Many[Sequence]) -> int:
    """Tokens that are still missing of all of them."""
    return sum(sequence.n_missing for sequence in sequences)
