"""Changes the residual stream while it is computed, each request's rows in its own way.

A request's wishes are checked and compiled once into a ``Plan``. Each step, ``Steering`` lays
all plans out as one table of ``Edits``, which the forward pass carries out row by row; it is
kept for the next step as long as the same requests sit in the same rows.

    plan = Plan.compile(request.steer, request.stop_when, library)
    edits = steering.edits([Steered(plan, 0, 1, first_position=40, n_prompt_tokens=31)], n_rows=8)
    model.forward(Step(..., edits=edits))
    outcome = edits.outcome()  # rows whose answer ends, rows that diverged

With ``z = x . encoder + bias``, ``f`` = ``z`` above the feature's threshold, else 0, and ``max``
its training maximum, one change is

    add      x + strength * max * decoder
    clamp    x + (strength * max - f) * decoder          the dictionary's error stays in x
    ablate   x - (x . u) * u, with u = decoder / |decoder|

(clamping as in "Scaling Monosemanticity", Anthropic 2024). Changes of one layer are made in the
order of the request's list. Conditions read the stream as the block computed it, before this
layer's changes. Rows that nobody steers keep their bits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.compiled.rows import steer
from fortpoint.engine.model import Floats
from fortpoint.engine.protocol import Condition, Steer
from fortpoint.errors import InvalidRequest
from fortpoint.features.library import Library, Target

MAX_STEERS = 16
MAX_STOP_CONDITIONS = 16
MAX_STRENGTH = 100.0
_MODES = ("add", "clamp", "ablate")
_SCOPES = ("all", "answer")
_LEAST_LENGTH = 1e-12


@dataclass(frozen=True, eq=False)
class _Read:
    """Holds where ``x . encoder + bias > limit`` after block ``layer``."""

    layer: int
    encoder: Floats
    bias: float
    limit: float


@dataclass(frozen=True, eq=False)
class _Change:
    """``x + (goal - f) * decoder``; ``f`` is ``z = x . encoder + bias`` above ``limit``, else 0."""

    layer: int
    encoder: Floats
    bias: float
    limit: float
    decoder: Floats
    goal: float
    answer_only: bool
    when: _Read | None


@dataclass(frozen=True, eq=False)
class Plan:
    """One request's steering, checked and ready."""

    changes: tuple[_Change, ...]
    stops: tuple[_Read, ...]

    @classmethod
    def compile(
        cls, steer: Sequence[Steer], stop_when: Sequence[Condition], library: Library
    ) -> Plan | None:
        """None when there is nothing to do. Raises ``InvalidRequest``."""
        if len(steer) > MAX_STEERS:
            raise InvalidRequest(f"at most {MAX_STEERS} changes can be made at once", param="steer")
        if len(stop_when) > MAX_STOP_CONDITIONS:
            raise InvalidRequest(
                f"at most {MAX_STOP_CONDITIONS} conditions can be watched", param="stop_when"
            )
        if not steer and not stop_when:
            return None
        changes = tuple(_change(wish, library) for wish in steer)
        stops = tuple(_read(condition, library) for condition in stop_when)
        return cls(changes, stops)

    @property
    def touches_prompt(self) -> bool:
        """What is computed for the prompt is this request's alone: never share its cache."""
        return any(not change.answer_only for change in self.changes)


def _change(wish: Steer, library: Library) -> _Change:
    if wish.mode not in _MODES or wish.scope not in _SCOPES:
        raise InvalidRequest("a steer's mode is add, clamp or ablate, its scope all or answer")
    if not (math.isfinite(wish.strength) and abs(wish.strength) <= MAX_STRENGTH):
        raise InvalidRequest(
            f"a steer's strength is a number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, "
            "in units of the feature's training maximum"
        )
    target = library.resolve(wish.target)
    when = None if wish.when is None else _read(wish.when, library)
    if when is not None and when.layer > target.layer:
        raise InvalidRequest(
            f"a condition of layer {when.layer} is not known yet at layer {target.layer}, "
            f"where {target.name!r} is; use a feature of that layer or an earlier one"
        )
    encoder, bias, limit = _reader_of(wish, target)
    ablate = wish.mode == "ablate"
    return _Change(
        layer=target.layer,
        encoder=_vector(encoder),
        bias=bias,
        limit=limit,
        decoder=_vector(_unit(target.decoder) if ablate else target.decoder),
        goal=0.0 if ablate else wish.strength * target.training_max,
        answer_only=wish.scope == "answer",
        when=when,
    )


def _reader_of(wish: Steer, target: Target) -> tuple[Floats, float, float]:
    """Encoder, bias and limit of the ``f`` that the change takes away."""
    if wish.mode == "clamp":
        return target.encoder, target.bias, target.threshold
    if wish.mode == "ablate":
        return _unit(target.decoder), 0.0, -math.inf
    return np.zeros_like(target.encoder), 0.0, math.inf


def _unit(direction: Floats) -> Floats:
    length = max(float(np.linalg.norm(direction)), _LEAST_LENGTH)
    return direction / np.float32(length)


def _read(condition: Condition, library: Library) -> _Read:
    if not math.isfinite(condition.above):
        raise InvalidRequest("a condition's `above` is a finite number")
    target = library.resolve(condition.feature)
    # An activation is 0 or above its threshold: more than a negative number it always is.
    limit = max(target.threshold, condition.above * target.training_max)
    always = condition.above < 0
    encoder = _vector(target.encoder)
    return _Read(target.layer, encoder, target.bias, -math.inf if always else limit)


def _vector(values: Floats) -> Floats:
    """As the forward pass reads it through its address."""
    return np.ascontiguousarray(values, np.float32)


@dataclass(frozen=True)
class Steered:
    """Rows ``start`` to ``end`` of a step are this plan's, from position ``first_position`` on.

    Positions from ``n_prompt_tokens`` on are the answer.
    """

    plan: Plan
    start: int
    end: int
    first_position: int
    n_prompt_tokens: int

    @property
    def answer_start(self) -> int:
        """The first row of the answer; ``end`` when there is none."""
        before = self.n_prompt_tokens - self.first_position
        return self.start + min(max(before, 0), self.end - self.start)


@dataclass(frozen=True)
class Outcome:
    """Row numbers of this step: where a ``stop_when`` holds, where a change diverged."""

    stopped: frozenset[int] = frozenset()
    diverged: frozenset[int] = frozenset()


class Steering:
    """Makes each step's ``Edits``; remembers the last ones. One thread uses it."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._plans: tuple[Plan, ...] = ()  # kept alive: the key has their ids
        self._edits: Edits | None = None

    def edits(self, rows: Sequence[Steered], n_rows: int) -> Edits | None:
        """None when no row of this step is steered or watched."""
        key = (n_rows, *((id(r.plan), r.start, r.end, r.answer_start) for r in rows))
        if key != self._key:
            self._key, self._plans = key, tuple(r.plan for r in rows)
            edits = Edits(rows, n_rows)
            self._edits = edits if edits.n_entries else None
        if self._edits is not None:
            self._edits.begin()
        return self._edits


class EditTable(NamedTuple):
    """What ``compiled.rows.steer`` reads, an entry for each change or condition of a row.

    ``encoder`` and ``decoder`` are addresses of ``[d_model]`` float32. An entry that has a
    number in ``writes_truth`` is a condition; ``gate`` is the truth that must hold, or -1.
    """

    encoder: NDArray[np.int64]
    decoder: NDArray[np.int64]
    bias: NDArray[np.float32]
    limit: NDArray[np.float32]
    goal: NDArray[np.float32]
    gate: NDArray[np.int64]
    writes_truth: NDArray[np.int64]
    truths: NDArray[np.uint8]
    diverged: NDArray[np.uint8]


@dataclass(frozen=True)
class _Entry:
    """One change, or one condition that becomes the truth of a number."""

    what: _Change | _Read
    gate: int = -1
    truth: int = -1


class Edits:
    """All changes of one composition of a batch, by layer and row.

    The entries of layer ``l`` and row ``r`` are ``starts[l * n_rows + r]`` up to the next one's.
    """

    def __init__(self, rows: Sequence[Steered], n_rows: int) -> None:
        self._n_rows = n_rows
        self._n_truths = 0
        self._stops: list[tuple[int, int]] = []  # (number of the truth, row)
        reads: defaultdict[tuple[int, int], list[_Entry]] = defaultdict(list)
        changes: defaultdict[tuple[int, int], list[_Entry]] = defaultdict(list)
        for steered in rows:
            self._add(steered, reads, changes)
        self.starts, entries = _ordered(reads, changes, n_rows)
        self.n_entries = len(entries)
        self._kept: object = rows  # whose plans hold the vectors that the table points to
        self.table = _table(entries, self._n_truths, n_rows)

    @classmethod
    def adding(cls, layer: int, rows: NDArray[np.float32]) -> Edits:
        """Adds ``rows`` ``[n_rows, d_model]`` to the stream after ``layer``, a row to each."""
        rows = np.ascontiguousarray(rows, np.float32)
        edits = cls((), len(rows))
        nothing = np.zeros(rows.shape[1], np.float32)
        changes = [_Change(layer, nothing, 0.0, math.inf, row, 1.0, False, None) for row in rows]
        edits.starts, entries = _ordered(
            {}, {(layer, i): [_Entry(change)] for i, change in enumerate(changes)}, len(rows)
        )
        edits.n_entries, edits._kept = len(entries), changes
        edits.table = _table(entries, 0, len(rows))
        return edits

    def begin(self) -> None:
        """Before a step."""
        self.table.truths[:] = 0
        self.table.diverged[:] = 0

    def apply(self, layer: int, x: NDArray[np.float32], first_row: int = 0) -> None:
        """For models in Python: change ``x``, rows ``first_row`` and on, in place."""
        columns = np.array([column.ctypes.data for column in self.table], np.int64)
        for i, row in enumerate(x):
            place = layer * self._n_rows + first_row + i
            if place + 1 < len(self.starts) and self.starts[place] < self.starts[place + 1]:
                first, last = self.starts[place], self.starts[place + 1]
                address = row.ctypes.data
                steer(address, first, last, columns.ctypes.data, first_row + i, x.shape[1])

    def outcome(self) -> Outcome:
        """What came of the step."""
        stopped = frozenset(row for number, row in self._stops if self.table.truths[number])
        return Outcome(stopped, frozenset(np.flatnonzero(self.table.diverged).tolist()))

    def _add(
        self,
        steered: Steered,
        reads: defaultdict[tuple[int, int], list[_Entry]],
        changes: defaultdict[tuple[int, int], list[_Entry]],
    ) -> None:
        answer = range(steered.answer_start, steered.end)
        everywhere = range(steered.start, steered.end)
        for change in steered.plan.changes:
            for row in answer if change.answer_only else everywhere:
                gate = -1 if change.when is None else self._truth(change.when, row, reads)
                changes[change.layer, row].append(_Entry(change, gate=gate))
        for stop in steered.plan.stops:
            self._stops += [(self._truth(stop, row, reads), row) for row in answer]

    def _truth(
        self, read: _Read, row: int, reads: defaultdict[tuple[int, int], list[_Entry]]
    ) -> int:
        """Have ``read`` done at this row; returns the number of its truth."""
        number = self._n_truths
        self._n_truths += 1
        reads[read.layer, row].append(_Entry(read, truth=number))
        return number


def _ordered(
    reads: Mapping[tuple[int, int], list[_Entry]],
    changes: Mapping[tuple[int, int], list[_Entry]],
    n_rows: int,
) -> tuple[NDArray[np.int64], list[_Entry]]:
    """Entries by layer and row, conditions first, and where each row's begin."""
    places = sorted({*reads, *changes})
    n_layers = places[-1][0] + 1 if places else 0
    counts = np.zeros(n_layers * n_rows + 1, np.int64)
    entries: list[_Entry] = []
    for layer, row in places:
        own = [*reads.get((layer, row), ()), *changes.get((layer, row), ())]
        counts[layer * n_rows + row + 1] = len(own)
        entries += own
    return np.cumsum(counts), entries


def _table(entries: Sequence[_Entry], n_truths: int, n_rows: int) -> EditTable:
    whats = [entry.what for entry in entries]
    changes = [what if isinstance(what, _Change) else None for what in whats]
    return EditTable(
        encoder=np.array([what.encoder.ctypes.data for what in whats], np.int64),
        decoder=np.array([c.decoder.ctypes.data if c else 0 for c in changes], np.int64),
        bias=np.array([what.bias for what in whats], np.float32),
        limit=np.array([what.limit for what in whats], np.float32),
        goal=np.array([c.goal if c else 0.0 for c in changes], np.float32),
        gate=np.array([entry.gate for entry in entries], np.int64),
        writes_truth=np.array([entry.truth for entry in entries], np.int64),
        truths=np.zeros(n_truths, np.uint8),
        diverged=np.zeros(n_rows, np.uint8),
    )
