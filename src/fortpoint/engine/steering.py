"""Changes the residual stream while it is computed, each request's rows in its own way.

A request's wishes are checked and compiled once into a ``Plan``. Each step, ``Steering`` makes
one ``Batch`` of all plans, whose few tensor operations a layer change every steered row at
once; it is kept for the next step as long as the same requests sit in the same rows.

    plan = Plan.compile(request.steer, request.stop_when, library)
    batch = steering.batch([Steered(plan, 0, 1, first_position=40, n_prompt_tokens=31)])
    x = batch(layer, x)  # after each block
    outcome = batch.finish()  # rows whose answer ends, rows that diverged

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fortpoint.engine.protocol import Condition, Steer
from fortpoint.errors import InvalidRequest
from fortpoint.features.library import Library, Target

MAX_STEERS = 16
MAX_STOP_CONDITIONS = 16
MAX_STRENGTH = 100.0
MAX_GROWTH = 1e4
"""A change that multiplies a row's norm by more has diverged."""

_HUGE = torch.finfo(torch.float32).max
_MODES = ("add", "clamp", "ablate")
_SCOPES = ("all", "answer")


@dataclass(frozen=True, eq=False)
class _Read:
    """Holds where ``x . encoder + bias > limit`` after block ``layer``."""

    layer: int
    encoder: Tensor
    bias: float
    limit: float


@dataclass(frozen=True, eq=False)
class _Change:
    """``x + (goal - f) * decoder``; ``f`` is ``z = x . encoder + bias`` above ``limit``, else 0."""

    layer: int
    encoder: Tensor
    bias: float
    limit: float
    decoder: Tensor
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
        encoder=encoder,
        bias=bias,
        limit=limit,
        decoder=_unit(target.decoder) if ablate else target.decoder,
        goal=0.0 if ablate else wish.strength * target.training_max,
        answer_only=wish.scope == "answer",
        when=when,
    )


def _reader_of(wish: Steer, target: Target) -> tuple[Tensor, float, float]:
    """Encoder, bias and limit of the ``f`` that the change takes away."""
    if wish.mode == "clamp":
        return target.encoder, target.bias, target.threshold
    if wish.mode == "ablate":
        return _unit(target.decoder), 0.0, -math.inf
    return torch.zeros_like(target.encoder), 0.0, math.inf


def _unit(direction: Tensor) -> Tensor:
    return torch.nn.functional.normalize(direction, dim=0)


def _read(condition: Condition, library: Library) -> _Read:
    if not math.isfinite(condition.above):
        raise InvalidRequest("a condition's `above` is a finite number")
    target = library.resolve(condition.feature)
    # An activation is 0 or above its threshold: more than a negative number it always is.
    limit = max(target.threshold, condition.above * target.training_max)
    always = condition.above < 0
    return _Read(target.layer, target.encoder, target.bias, -math.inf if always else limit)


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
    """Makes each step's ``Batch``; remembers the last one's layout. One thread uses it."""

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int, int, int], ...] = ()
        self._plans: tuple[Plan, ...] = ()  # kept alive: the key has their ids
        self._layout: _Layout | None = None

    def batch(self, rows: Sequence[Steered]) -> Batch | None:
        """None when no row of this step is steered or watched."""
        key = tuple((id(r.plan), r.start, r.end, r.answer_start) for r in rows)
        if key != self._key:
            self._key, self._plans = key, tuple(r.plan for r in rows)
            layout = _Layout(rows)
            self._layout = layout if layout.reads or layout.rounds else None
        return None if self._layout is None else Batch(self._layout)


@dataclass(frozen=True, eq=False)
class _Reads:
    """All conditions of one layer; ``numbers`` says which of the step's truths they become."""

    rows: Tensor  # [n]
    encoder: Tensor  # [n, d_model, 1]
    bias: Tensor  # [n, 1, 1]
    limit: Tensor  # [n, 1, 1]
    numbers: Tensor  # [n]

    @classmethod
    def of(cls, entries: Sequence[tuple[range, _Read, int]]) -> _Reads:
        counts = [len(where) for where, _, _ in entries]
        reads = [read for _, read, _ in entries]
        return cls(
            rows=_numbers(where for where, _, _ in entries),
            encoder=_spread(torch.stack([r.encoder for r in reads]), counts).unsqueeze(-1),
            bias=_spread(torch.tensor([r.bias for r in reads]), counts).view(-1, 1, 1),
            limit=_spread(torch.tensor([r.limit for r in reads]), counts).view(-1, 1, 1),
            numbers=_numbers(
                range(first, first + n) for (_, _, first), n in zip(entries, counts, strict=True)
            ),
        )


@dataclass(frozen=True, eq=False)
class _Round:
    """The k-th change of every row that has one at this layer."""

    rows: Tensor  # [n]
    encoder: Tensor  # [n, d_model, 1]
    bias: Tensor  # [n, 1, 1]
    limit: Tensor  # [n, 1, 1]
    decoder: Tensor  # [n, d_model]
    goal: Tensor  # [n, 1, 1]
    gates: Tensor | None  # [n]: which of the step's truths must hold; None where all go ahead

    @classmethod
    def of(cls, entries: Sequence[tuple[range, _Change, int]]) -> _Round:
        counts = [len(where) for where, _, _ in entries]
        changes = [change for _, change, _ in entries]
        gated = any(first for _, _, first in entries)
        gates = (
            range(first, first + n) if first else [0] * n
            for (_, _, first), n in zip(entries, counts, strict=True)
        )
        return cls(
            rows=_numbers(where for where, _, _ in entries),
            encoder=_spread(torch.stack([c.encoder for c in changes]), counts).unsqueeze(-1),
            bias=_spread(torch.tensor([c.bias for c in changes]), counts).view(-1, 1, 1),
            limit=_spread(torch.tensor([c.limit for c in changes]), counts).view(-1, 1, 1),
            decoder=_spread(torch.stack([c.decoder for c in changes]), counts),
            goal=_spread(torch.tensor([c.goal for c in changes]), counts).view(-1, 1, 1),
            gates=_numbers(gates) if gated else None,
        )


def _numbers(ranges: Iterable[Iterable[int]]) -> Tensor:
    return torch.tensor([number for numbers in ranges for number in numbers])


def _spread(per_request: Tensor, counts: list[int]) -> Tensor:
    """Each request's entry once for each of its rows."""
    if all(count == 1 for count in counts):
        return per_request
    return per_request.repeat_interleave(torch.tensor(counts), dim=0)


@dataclass
class _Part:
    """What is gathered for one layer before it becomes tensors."""

    reads: list[tuple[range, _Read, int]] = field(default_factory=list)
    rounds: list[list[tuple[range, _Change, int]]] = field(default_factory=list)


class _Layout:
    """Where everything lies for one composition of a batch; it holds no state of a step."""

    def __init__(self, rows: Sequence[Steered]) -> None:
        self.n_truths = 1  # truth number 0 always holds
        self.stops: list[tuple[int, int]] = []  # (number of the truth, row)
        parts: defaultdict[int, _Part] = defaultdict(_Part)
        for steered in rows:
            self._add(steered, parts)
        self.reads = {layer: _Reads.of(part.reads) for layer, part in parts.items() if part.reads}
        self.rounds = {
            layer: [_Round.of(entries) for entries in part.rounds]
            for layer, part in parts.items()
            if part.rounds
        }

    def _add(self, steered: Steered, parts: defaultdict[int, _Part]) -> None:
        everywhere = range(steered.start, steered.end)
        answer = range(steered.answer_start, steered.end)
        n_before: defaultdict[int, int] = defaultdict(int)
        for change in steered.plan.changes:
            where = answer if change.answer_only else everywhere
            if not where:
                continue
            gate = 0 if change.when is None else self._read(change.when, where, parts)
            rounds = parts[change.layer].rounds
            if n_before[change.layer] == len(rounds):
                rounds.append([])
            rounds[n_before[change.layer]].append((where, change, gate))
            n_before[change.layer] += 1
        for stop in steered.plan.stops if answer else ():
            first = self._read(stop, answer, parts)
            self.stops += [(first + i, row) for i, row in enumerate(answer)]

    def _read(self, read: _Read, where: range, parts: defaultdict[int, _Part]) -> int:
        """Have ``read`` done at these rows; returns the number of the first of its truths."""
        first = self.n_truths
        self.n_truths += len(where)
        parts[read.layer].reads.append((where, read, first))
        return first


class Batch:
    """One step's steering: call it after each block, then ``finish``."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self._truths = torch.ones(layout.n_truths)
        self._changed: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, before, after

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """``x`` ``[n_rows, d_model]`` itself, or a changed copy."""
        reads, rounds = self._layout.reads.get(layer), self._layout.rounds.get(layer)
        if reads is not None:
            self._read(reads, x)
        if rounds is None:
            return x
        changed = x.clone()
        for round_ in rounds:
            self._change(round_, changed)
        return changed

    def finish(self) -> Outcome:
        """What came of this step; call it once, after the last block."""
        return Outcome(self._stopped(), self._diverged())

    def _read(self, reads: _Reads, x: Tensor) -> None:
        rows = x.index_select(0, reads.rows).float()
        z = torch.baddbmm(reads.bias, rows.unsqueeze(1), reads.encoder)
        self._truths.index_copy_(0, reads.numbers, (z > reads.limit).view(-1).float())

    def _change(self, round_: _Round, x: Tensor) -> None:
        """Make one round's changes in ``x``, which is our own copy."""
        before = x.index_select(0, round_.rows).float()
        z = torch.baddbmm(round_.bias, before.unsqueeze(1), round_.encoder)
        scale = torch.addcmul(round_.goal, z, z > round_.limit, value=-1).view(-1, 1)
        if round_.gates is not None:
            scale = scale * self._truths.index_select(0, round_.gates).unsqueeze(1)
        after = torch.addcmul(before, scale, round_.decoder)
        x.index_copy_(0, round_.rows, after.to(x.dtype))
        self._changed.append((round_.rows, before, after))

    def _stopped(self) -> frozenset[int]:
        if not self._layout.stops:
            return frozenset()
        truths = self._truths.tolist()
        return frozenset(row for number, row in self._layout.stops if truths[number])

    def _diverged(self) -> frozenset[int]:
        """Rows with a change to values that are not finite, or ``MAX_GROWTH`` times as long."""
        if not self._changed:
            return frozenset()
        rows, before, after = (torch.cat(tensors) for tensors in zip(*self._changed, strict=True))
        limit = torch.linalg.vector_norm(before, dim=-1).mul_(MAX_GROWTH).clamp_(1.0, _HUGE)
        sound = torch.linalg.vector_norm(after, dim=-1) <= limit  # NaN is not
        if sound.all():
            return frozenset()
        return frozenset(rows[~sound].tolist())
