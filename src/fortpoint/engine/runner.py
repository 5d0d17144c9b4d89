"""The compute thread: takes jobs in, steps the model, gives events out.

All model state belongs to this thread. Others reach it through ``submit``, ``proceed``,
``cancel`` and ``drop``, which only queue; what they ask for is done before the next step. A
step's events are given out together. When a step fails, its requests are computed again one by
one, so that only those that fail by themselves do.

An error anywhere else is ours: the thread ends, and says so to ``on_crash``, since an engine
that goes on after it could not be trusted.
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
from collections.abc import Callable
from collections.abc import Sequence as Many

from fortpoint.engine.answers import Answers
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.model import Model
from fortpoint.engine.passes import Computed, Pass, Passes
from fortpoint.engine.protocol import Generate
from fortpoint.engine.results import Results
from fortpoint.engine.scheduler import Scheduler, Work
from fortpoint.engine.sequence import Job, Outbox, Sent, Sequence
from fortpoint.engine.taps import Part, Taps
from fortpoint.errors import EngineBusy, EngineError, FortPointError, InvalidRequest


class Runner:
    """Steps ``model`` for all jobs. ``start`` begins the thread, ``stop`` ends it.

    ``deliver`` is called from the compute thread with the events of a step.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: ChatTokenizer,
        taps: Taps,
        scheduler: Scheduler,
        deliver: Callable[[list[Sent]], object],
        on_crash: Callable[[], object] = lambda: None,
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._outbox = Outbox(deliver)
        self._on_crash = on_crash
        self._passes = Passes(model, taps)
        self._answers = Answers(
            tokenizer,
            scheduler,
            taps,
            model.max_context,
            model.new_cache,
            self._end,
            self._passes.wait,
        )
        self._results = Results(model, tokenizer, scheduler, taps)
        self._numbers = itertools.count()
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
        self._passes.close()

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._admit(job))

    def proceed(self, job: Job) -> None:
        self._commands.put(lambda: self._let_proceed(job))

    def cancel(self, job: Job) -> None:
        self._commands.put(lambda: self._end(job))

    def drop(self, job: Job, choice: int) -> None:
        """End one of its answers; the others go on."""
        self._commands.put(lambda: self._answers.drop(job, choice))

    def _run(self) -> None:
        busy = False
        try:
            while self.obey(wait=not busy):
                busy = self.step()
        except BaseException:
            self._on_crash()
            raise

    def obey(self, *, wait: bool) -> bool:
        """Carry out queued commands; False when told to stop."""
        try:
            while True:
                command = self._commands.get(block=wait)
                if command is None:
                    return False
                command()
                wait = False
        except queue.Empty:
            self._flush()
            return True

    def _admit(self, job: Job) -> None:
        if job.ended:  # cancelled before it was admitted
            return
        job.outbox = self._outbox
        if refused := self._refusal(job):
            job.fail(refused)
            return
        job.number = next(self._numbers)
        job.n_open = len(job.prompts)
        for index, prompt in enumerate(job.prompts):
            # The last token of a continuation is scored, and nothing after it.
            tokens = [*prompt.tokens, *job.continuation[:-1]]
            cache = self._model.new_cache()
            self._scheduler.add(Sequence(job, index, prompt, cache, tokens))

    def _refusal(self, job: Job) -> FortPointError | None:
        most, request = self._scheduler.max_batch, job.request
        if isinstance(request, Generate) and request.sampling.n > most:
            return InvalidRequest(f"this engine gives at most {most} answers at once", param="n")
        if self._scheduler.full:
            crowding = self._scheduler.waiting.crowding(job.tenant)
            if crowding is None:
                return _busy()
            self._fail(crowding.job, _busy())
        return None

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
        if works:
            self._compute(works)
        self._flush()
        return bool(works)

    def _flush(self) -> None:
        self._answers.fill()
        self._outbox.flush()

    def _compute(self, works: Many[Work]) -> None:
        before = [work.sequence.cache.length for work in works]
        try:
            done = self._passes.compute(works)
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, it is one request's
            print(f"engine: a step failed: {type(error).__name__}", file=sys.stderr, flush=True)
            self._blame(works, before)
        else:
            self._advance(done)

    def _blame(self, works: Many[Work], before: Many[int]) -> None:
        """The failed step's works one by one; the one that fails alone has failed."""
        for work, length in zip(works, before, strict=True):
            job = work.sequence.job
            if job.ended:
                continue
            if len(works) > 1 and work.sequence.cache.length == length:
                self._compute([work])
            else:
                self._fail(job, EngineError("the engine failed on this request"))

    def _fail(self, job: Job, error: FortPointError) -> None:
        job.fail(error)
        self._end(job)

    def _advance(self, done: Pass) -> None:
        """Note what was computed; whatever is complete goes on or ends."""
        ready: list[Computed] = []
        for computed in done.works:
            sequence = computed.work.sequence
            job = sequence.job
            if job.ended:
                continue
            if computed.fault is not None:
                self._fail(job, computed.fault)
                continue
            self._note(sequence, computed.part)
            if not job.is_generation:
                self._results.advance(done, computed)
            elif sequence.n_missing == 0:
                ready.append(computed)
        self._answers.advance(done, [c for c in ready if not c.work.sequence.job.ended])

    @staticmethod
    def _note(sequence: Sequence, part: Part) -> None:
        if sequence.job.is_embedding:
            return
        sequence.newest = part
        if sequence.answer is None:
            sequence.read.append(part)
        elif sequence.job.shares_answer:
            sequence.read.append(Part(part.logits))
        if sequence.published or not sequence.job.shares:
            return
        if sequence.cache.length >= sequence.n_prompt > 0:
            sequence.published = True
            sequence.publish(sequence.n_prompt)


def _busy() -> EngineBusy:
    return EngineBusy("too many requests wait for the model; try again soon")
