"""A job is one request; a sequence is one run of tokens that it needs computed.

A generation with ``n`` answers is one sequence while its prompt is read, then ``n``. A
preempted sequence loses its cache, keeps its tokens, and is computed again later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fortpoint.engine.chat import Prompt
from fortpoint.engine.detokenizer import Detokenizer
from fortpoint.engine.kv_cache import KVCache
from fortpoint.engine.protocol import Embed, Event, Failed, Generate, Sampling, Scan
from fortpoint.errors import FortPointError


@dataclass(eq=False)
class Job:
    """One request and where its events go. Belongs to the compute thread once submitted."""

    request: Generate | Scan | Embed
    prompts: tuple[Prompt, ...]
    emit: Callable[[Event], None]
    proceeding: bool = False
    ended: bool = False
    n_open: int = 0
    n_completion_tokens: int = 0
    vectors: dict[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def n_prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    def send(self, event: Event, *, last: bool = False) -> None:
        """Nothing follows the last event."""
        if not self.ended:
            self.ended = last
            self.emit(event)

    def fail(self, error: FortPointError) -> None:
        self.send(Failed(self.request.id, error.code, error.message), last=True)


@dataclass(eq=False)
class Answer:
    """How a sequence goes on after its prompt."""

    sampling: Sampling
    source: torch.Generator
    text: Detokenizer


@dataclass(eq=False)
class Sequence:
    """``tokens`` is prompt and answer; the first ``cache.length`` of them are computed.

    ``index`` is the answer's number in a generation, the text's number in an embedding.
    ``read`` collects the probes' logits, ``pooled`` the sum of residuals ``[d_model]``.
    ``first_logits`` ``[vocab]`` waits, while ``parked``, for leave to answer.
    """

    job: Job
    index: int
    prompt: Prompt
    cache: KVCache
    tokens: list[int]
    answer: Answer | None = None
    parked: bool = False
    first_logits: Tensor | None = None
    read: list[Tensor] = field(default_factory=list)
    pooled: Tensor | None = None

    @property
    def n_missing(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return len(self.tokens) - self.cache.length

    @property
    def n_answer(self) -> int:
        return len(self.tokens) - len(self.prompt.tokens)

    @property
    def decodes(self) -> bool:
        """One row a step: only the newest token of the answer is missing."""
        return not self.parked and self.n_missing == 1 and self.n_answer > 0

    def evict(self) -> None:
        """Give up all that was computed; the tokens stay, to be computed again."""
        self.cache.release()
        self.read.clear()
        self.pooled = None
