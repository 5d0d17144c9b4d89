"""The compute thread: takes jobs in, steps the model, gives events out.

All model state belongs to this thread. Others reach it through ``submit``, ``proceed`` and
``cancel``, which only queue. An error inside a step fails the requests of that step and
nothing else.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from fortpoint.engine.answers import Answers
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.kv_cache import KVBudget, KVCache
from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Span
from fortpoint.engine.protocol import Embed, Embedded, Generate, Scan, Scanned
from fortpoint.engine.scheduler import Scheduler, Work
from fortpoint.engine.sequence import Job, Sequence
from fortpoint.errors import EngineBusy, EngineError
from fortpoint.types import Reading, Usage


class Runner:
    """Steps ``model`` for all jobs. ``start`` begins the thread, ``stop`` ends it."""

    def __init__(
        self,
        model: Llama,
        tokenizer: ChatTokenizer,
        probes: LinearProbes,
        scheduler: Scheduler,
        budget: KVBudget,
    ) -> None:
        self._model = model
        self._probes = probes
        self._scheduler = scheduler
        self._budget = budget
        self._answers = Answers(tokenizer, scheduler, model.max_context, self._new_cache)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    @property
    def n_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def n_waiting(self) -> int:
        return len(self._scheduler.waiting)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._admit(job))

    def proceed(self, job: Job) -> None:
        self._commands.put(lambda: self._let_proceed(job))

    def cancel(self, job: Job) -> None:
        self._commands.put(lambda: self._end(job))

    def _new_cache(self) -> KVCache:
        return self._model.cache(self._budget)

    def _run(self) -> None:
        busy = False
        while self._obey(wait=not busy):
            busy = self.step()

    def _obey(self, *, wait: bool) -> bool:
        """Carry out queued commands; False when told to stop."""
        try:
            while True:
                command = self._commands.get(block=wait)
                if command is None:
                    return False
                command()
                wait = False
        except queue.Empty:
            return True

    def _admit(self, job: Job) -> None:
        if job.ended:  # cancelled before it was admitted
            return
        if self._scheduler.full:
            job.fail(EngineBusy("too many requests wait for the model; try again soon"))
            return
        job.n_open = len(job.prompts)
        for index, prompt in enumerate(job.prompts):
            tokens = list(prompt.tokens)
            self._scheduler.add(Sequence(job, index, prompt, self._new_cache(), tokens))

    def _let_proceed(self, job: Job) -> None:
        job.proceeding = True
        for sequence in self._scheduler.of(job):
            self._answers.begin(sequence)

    def _end(self, job: Job) -> None:
        job.ended = True
        for sequence in self._scheduler.of(job):
            self._scheduler.remove(sequence)

    def step(self) -> bool:
        """Compute one step; False when there is nothing to compute."""
        works = self._scheduler.plan()
        with torch.inference_mode():
            for kind in (Generate, Scan, Embed):
                same = [work for work in works if isinstance(work.sequence.job.request, kind)]
                if same:
                    self._compute(kind, same)
        return bool(works)

    def _compute(self, kind: type, works: Many[Work]) -> None:
        try:
            x, read = self._forward(kind, works)
        except (RuntimeError, MemoryError):
            for work in works:
                work.sequence.job.fail(EngineError("the engine failed on this request"))
                self._end(work.sequence.job)
            return
        ready, end = [], 0
        for work in works:
            sequence, start, end = work.sequence, end, end + work.n_rows
            if sequence.answer is None:
                sequence.read.append(read[start:end])
            if kind is Embed:
                pooled = self._model.normed(x[start:end]).float().sum(0)
                sequence.pooled = pooled if sequence.pooled is None else sequence.pooled + pooled
            if sequence.n_missing == 0:
                ready.append((sequence, end - 1))
        if ready:
            self._advance(kind, ready, x)

    def _forward(self, kind: type, works: Many[Work]) -> tuple[Tensor, Tensor]:
        """Residual stream ``[n_rows, d_model]`` and the probes' logits ``[n_rows, n_probes]``."""
        tokens: list[int] = []
        spans: list[Span] = []
        for work in works:
            sequence, start = work.sequence, work.sequence.cache.length
            spans.append(Span(sequence.cache, len(tokens), len(tokens) + work.n_rows))
            tokens.extend(sequence.tokens[start : start + work.n_rows])
        probes, logits = self._probes, self._probes.new_logits(len(tokens))

        def read(layer: int, x: Tensor) -> None:
            probes.add(layer, x, logits)

        until = probes.last_layer if kind is Scan else None
        return self._model.forward(tokens, spans, read, until_layer=until), logits

    def _advance(self, kind: type, ready: Many[tuple[Sequence, int]], x: Tensor) -> None:
        if kind is Generate:
            logits = self._model.logits(x[[row for _, row in ready]])
            finite = torch.isfinite(logits).all(dim=-1).tolist()
            for (sequence, _), row, sound in zip(ready, logits, finite, strict=True):
                if sound:
                    reading = None if sequence.answer else self._reading(sequence)
                    self._answers.advance(sequence, row, reading)
                else:
                    sequence.job.fail(EngineError("the model computed no finite answer"))
                    self._end(sequence.job)
            return
        for sequence, _ in ready:
            self._complete(sequence)

    def _complete(self, sequence: Sequence) -> None:
        """The end of a scan, or of one text of an embedding."""
        job = sequence.job
        self._scheduler.remove(sequence)
        usage = Usage(job.n_prompt_tokens)
        if sequence.pooled is None:
            job.send(Scanned(job.request.id, usage, self._reading(sequence)), last=True)
            return
        unit = torch.nn.functional.normalize(sequence.pooled, dim=0)
        job.vectors[sequence.index] = tuple(unit.tolist())
        if len(job.vectors) == len(job.prompts):
            vectors = tuple(job.vectors[i] for i in range(len(job.prompts)))
            job.send(Embedded(job.request.id, usage, vectors), last=True)

    def _reading(self, sequence: Sequence) -> Reading:
        logits = torch.cat(sequence.read).contiguous()
        sequence.read.clear()
        return Reading(
            probes=self._probes.names,
            n_tokens=len(logits),
            logits=logits.numpy().astype("<f4").tobytes(),
            segments=sequence.prompt.segments,
        )
