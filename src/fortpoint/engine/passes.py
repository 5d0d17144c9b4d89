"""One pass through the model for all kinds of rows at once, and what came of it for each.

Rows that decode come first, then prompts' chunks. Logits are computed only where a token is
chosen or scored; layers are kept only where somebody reads. Where all rows are scans', the
pass ends with the last layer that their reading needs.

A row is sound when its values are finite and its own steering did not diverge. One that is not
ends its own request; nobody else's rows depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.model import Floats, Model, Result, Span, Step
from fortpoint.engine.scheduler import Work
from fortpoint.engine.steering import Edits, Outcome, Steered, Steering
from fortpoint.engine.taps import Part, Rows, Taps
from fortpoint.errors import EngineError, FortPointError, SteeringDiverged


class Computed(NamedTuple):
    """What came of one work: rows ``start`` to ``end`` of the pass.

    ``logits`` are its rows of the pass's logits; ``fault`` is why its request must end;
    ``stopped`` says that a ``stop_when`` holds.
    """

    work: Work
    start: int
    end: int
    logits: range
    part: Part
    stopped: bool
    fault: FortPointError | None


_NO_ROWS = range(0)


@dataclass(frozen=True)
class Pass:
    """What the model computed, and each work's part of it. Overwritten by the next pass.

    ``likeliest`` ``[n]`` is the argmax of each row of ``logits`` ``[n, vocab]``.
    """

    works: list[Computed]
    residual: Floats
    logits: Floats
    likeliest: NDArray[np.intp]


class Passes:
    """Makes steps of works and has ``model`` compute them."""

    def __init__(self, model: Model, taps: Taps) -> None:
        self._model = model
        self._taps = taps
        self._steering = Steering()
        self._reader = ThreadPoolExecutor(1, "taps")
        self._reading: Future[None] | None = None

    def compute(self, works: Many[Work]) -> Pass:
        """Compute the works' rows. Raises what the model raises; then nothing has changed."""
        self.wait()
        plan = _Plan(works)
        # What diverges may become anything: it is looked for afterwards, row by row.
        with np.errstate(all="ignore"):
            edits = self._steering.edits(plan.steered, len(plan.tokens))
            result = self._model.forward(self._step(works, plan, edits))
            # Probes and features are read beside the choice of tokens: neither holds the
            # interpreter's lock for long. Only what answers are chosen from can wait so.
            parts, fill = self._taps.begin(plan.rows, result.seen)
            self._reading = self._reader.submit(fill)
            if not all(work.sequence.decodes for work in works):
                self.wait()
            return _Findings(plan, result, edits).of(works, parts)

    def wait(self) -> None:
        """Until the last pass's parts hold what was read. Before the next pass, at the latest."""
        if self._reading is not None:
            reading, self._reading = self._reading, None
            reading.result()

    def close(self) -> None:
        self._reader.shutdown()

    def _step(self, works: Many[Work], plan: _Plan, edits: Edits | None) -> Step:
        scans = all(work.sequence.job.is_scan for work in works)
        return Step(
            tokens=plan.tokens,
            spans=plan.spans,
            logit_rows=plan.logit_rows,
            tap_layers=self._taps.layers(plan.rows),
            edits=edits,
            last_layer=max(self._taps.last_layer(), 0) if scans else None,
        )


class _Plan:
    """Which row is whose."""

    def __init__(self, works: Many[Work]) -> None:
        self.tokens: list[int] = []
        self.spans: list[Span] = []
        self.rows: list[Rows] = []
        self.steered: list[Steered] = []
        self.logit_rows: list[int] = []
        self.logits: list[range] = []
        for work in works:
            self._add(work)

    def _add(self, work: Work) -> None:
        sequence, start = work.sequence, len(self.tokens)
        job, first = sequence.job, sequence.cache.length
        end = start + work.n_rows
        self.tokens += sequence.tokens[first : first + work.n_rows]
        self.spans.append(Span(sequence.cache, start, end, job.adapter))
        self.rows.append(_rows(start, end, job.watch))
        if job.plan is not None:
            self.steered.append(Steered(job.plan, start, end, first, sequence.n_prompt))
        wanted = _logit_rows(work, start, end)
        self.logits.append(range(len(self.logit_rows), len(self.logit_rows) + len(wanted)))
        self.logit_rows += wanted


_rows = lru_cache(1024)(Rows)  # the same ones at every step of a decoding batch


def _logit_rows(work: Work, start: int, end: int) -> range:
    """The rows of ``work`` from which a token is chosen or scored."""
    sequence = work.sequence
    if sequence.scores:
        return range(start, end)
    chooses = sequence.job.is_generation and work.n_rows == sequence.n_missing
    return range(end - 1, end) if chooses else _NO_ROWS


class _Findings:
    """What is wrong with which rows, and where answers end."""

    def __init__(self, plan: _Plan, result: Result, edits: Edits | None) -> None:
        self._plan = plan
        self._result = result
        self._outcome = Outcome() if edits is None else edits.outcome()
        logits = result.logits
        self._likeliest = logits.argmax(axis=1) if len(logits) else np.zeros(0, np.intp)
        # The largest of a row that has a NaN is NaN.
        self._peaks = logits[np.arange(len(logits)), self._likeliest]
        self._finite = bool(np.isfinite(self._peaks).all() and np.isfinite(result.residual).all())

    def of(self, works: Many[Work], parts: Many[Part]) -> Pass:
        found = zip(works, self._plan.spans, self._plan.logits, parts, strict=True)
        stopped, sound = self._outcome.stopped, self._finite and not self._outcome.diverged
        computed = [
            Computed(
                work,
                span.start,
                span.end,
                logits,
                part,
                bool(stopped) and self._any(stopped, span),
                None if sound else self._fault(work, span, logits, part),
            )
            for work, span, logits, part in found
        ]
        return Pass(computed, self._result.residual, self._result.logits, self._likeliest)

    def _fault(self, work: Work, span: Span, logits: range, part: Part) -> FortPointError | None:
        if self._any(self._outcome.diverged, span):
            return _diverged()
        if self._finite or self._is_finite(work, span, logits, part):
            return None
        if work.sequence.job.plan is not None and work.sequence.job.plan.changes:
            return _diverged()
        return EngineError("the model computed no finite answer")

    def _is_finite(self, work: Work, span: Span, logits: range, part: Part) -> bool:
        if work.sequence.job.is_scan:  # its last layers' keys may never have been computed
            return bool(np.isfinite(part.logits).all())
        residual = self._result.residual[span.start : span.end]
        peaks = self._peaks[logits.start : logits.stop]
        return bool(np.isfinite(residual).all() and np.isfinite(peaks).all())

    @staticmethod
    def _any(rows: frozenset[int], span: Span) -> bool:
        return not rows.isdisjoint(range(span.start, span.end))


def _diverged() -> SteeringDiverged:
    return SteeringDiverged("the steering drove the activations out of bounds; use less strength")
