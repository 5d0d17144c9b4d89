"""What requests without answers get: scans, embeddings and scores.

A score is teacher-forced: the logits of each position say how likely the token is that really
comes next. The softmax is taken in double precision; nothing is rounded.
"""

from __future__ import annotations

import numpy as np

from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.model import Floats, Model
from fortpoint.engine.passes import Computed, Pass
from fortpoint.engine.protocol import Embedded, Scanned, Scored
from fortpoint.engine.scheduler import Scheduler
from fortpoint.engine.sequence import Job, Sequence
from fortpoint.engine.taps import Taps
from fortpoint.errors import EngineError
from fortpoint.types import Usage


class Results:
    """Gathers what passes computed, and sends it once all is there."""

    def __init__(
        self, model: Model, tokenizer: ChatTokenizer, scheduler: Scheduler, taps: Taps
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._taps = taps

    def advance(self, done: Pass, computed: Computed) -> None:
        """Take what this pass has for the sequence, which may have been its last."""
        sequence = computed.work.sequence
        job, complete = sequence.job, sequence.n_missing == 0
        if job.is_embedding:
            self._pool(sequence, done.residual[computed.start : computed.end])
        elif job.is_score:
            self._score(sequence, done.logits[computed.logits.start : computed.logits.stop])
        if not complete:
            return
        if job.is_scan:
            reading = self._taps.reading(sequence.read, sequence.prompt.segments)
            job.send(Scanned(job.request.id, Usage(job.n_prompt_tokens), reading), last=True)
        elif job.is_score:
            self._send_scores(sequence)
        else:
            self._send_vectors(sequence)
        self._scheduler.remove(sequence)

    def _pool(self, sequence: Sequence, residual: Floats) -> None:
        pooled = self._model.normed(residual).sum(axis=0, dtype=np.float64)
        sequence.pooled = pooled if sequence.pooled is None else sequence.pooled + pooled

    def _send_vectors(self, sequence: Sequence) -> None:
        job, pooled = sequence.job, sequence.pooled
        length = 0.0 if pooled is None else float(np.linalg.norm(pooled))
        if pooled is None or not 0 < length < np.inf:
            job.fail(EngineError("the model computed no finite embedding"))
            return
        job.vectors[sequence.index] = tuple((pooled / length).tolist())
        if len(job.vectors) == len(job.prompts):
            vectors = tuple(job.vectors[i] for i in range(len(job.prompts)))
            event = Embedded(job.request.id, Usage(job.n_prompt_tokens), vectors)
            job.send(event, last=True)

    def _score(self, sequence: Sequence, logits: Floats) -> None:
        for row in logits:
            token = _scored_tokens(sequence.job)[len(sequence.logprobs)]
            wide = row.astype(np.float64)
            wide -= wide.max()
            sequence.logprobs.append(float(wide[token] - np.log(np.exp(wide).sum())))

    def _send_scores(self, sequence: Sequence) -> None:
        job = sequence.job
        texts = tuple(self._tokenizer.decode((token,)) for token in _scored_tokens(job))
        usage = Usage(job.n_prompt_tokens, len(job.continuation))
        scored = Scored(job.request.id, usage, texts, tuple(sequence.logprobs))
        job.send(scored, last=True)


def _scored_tokens(job: Job) -> tuple[int, ...]:
    """The continuation; without a prompt nothing says how likely its first token is."""
    return job.continuation if job.n_prompt_tokens else job.continuation[1:]
