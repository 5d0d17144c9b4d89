"""Finds the strength at which a steered model talks about something and still talks sense.

Each setting answers the same questions. Three figures say what came of it: the share of answers
in which the concept is *present*; how surprised the unsteered model is by the answers, as a
ratio of perplexities to its own answers; and how few word sequences are repeated, since a loop
surprises no model.

    report = sweep(model, questions, settings, present, progress)
    report.recommended  # of the settings that are present enough and sane, the best; or None

What can answer is given as a ``Model``: the engine's, or anything else's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest
from fortpoint.features.concepts.quality import Interval, share
from fortpoint.features.concepts.reading import Stream, Tokenizer, read, tokenize
from fortpoint.features.library import Target

MAX_RATIO = 3.0
MIN_SHARE = 0.8
MIN_DISTINCT = 0.75
"""Of the model's own share of different word sequences."""

_HOPELESS = 4.0  # times the largest ratio: beyond, stronger settings are not tried

Present = Callable[[Sequence[str]], Sequence[bool]]
Progress = Callable[[str, int, int], None]


class Setting(msgspec.Struct, frozen=True):
    """How a model is turned: every target by ``strength``, and what the system prompt says."""

    targets: tuple[str, ...] = ()
    strength: float = 0.0
    mode: Literal["add", "clamp"] = "clamp"
    scope: Literal["all", "answer"] = "all"
    system: str | None = None


class Model(Protocol):
    """Answers questions and says how likely an answer is without any setting."""

    def answers(self, questions: Sequence[str], setting: Setting) -> list[str | None]:
        """One each; None where the setting broke the activations."""

    def nats(self, questions: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float64]]:
        """Negative log-likelihood of each token of each answer, unsteered, no system prompt."""


class Point(msgspec.Struct, frozen=True):
    """What came of one setting.

    ``perplexity`` is over all tokens of all answers, ``ratio`` to that of the model's own;
    ``median_ratio`` is over questions. ``distinct`` is the share of different three-word runs.
    ``broken`` answers are neither present nor in the perplexity.
    """

    setting: Setting
    present: Interval
    perplexity: float
    ratio: float
    median_ratio: float
    distinct: float
    broken: int
    n: int
    examples: tuple[str, ...]


class Report(msgspec.Struct, frozen=True):
    """``own`` is the model as it is; ``points`` in the order tried."""

    own: Point
    points: tuple[Point, ...]
    recommended: Point | None


def sweep(
    model: Model,
    questions: Sequence[str],
    settings: Sequence[Setting],
    present: Present,
    progress: Progress = lambda stage, done, total: None,
    *,
    min_share: float = MIN_SHARE,
    max_ratio: float = MAX_RATIO,
) -> Report:
    """Try ``settings``, weakest first within each kind. Raises ``InvalidRequest`` for nothing.

    Once a kind (targets, mode, scope) makes no sense any more, its stronger ones are left out.
    """
    if not questions or not settings:
        raise InvalidRequest("a sweep needs at least one question and one strength")
    own = _hear(model, questions, Setting())
    points: list[Point] = []
    hopeless: set[Setting] = set()
    for number, setting in enumerate(sorted(settings, key=lambda one: abs(one.strength))):
        kind = msgspec.structs.replace(setting, strength=0.0)
        if kind not in hopeless:
            point = _point(setting, _hear(model, questions, setting), present, own)
            points.append(point)
            if not point.ratio < _HOPELESS * max_ratio:
                hopeless.add(kind)
        progress("sweep", number + 1, len(settings))
    itself = _point(Setting(), own, present, own)
    return Report(itself, tuple(points), recommend(itself, points, min_share, max_ratio))


def recommend(
    own: Point,
    points: Sequence[Point],
    min_share: float = MIN_SHARE,
    max_ratio: float = MAX_RATIO,
) -> Point | None:
    """Of the points that are sane and have the share, the one furthest from all three limits.

    Sane: none broken, a ratio under ``max_ratio``, and not much more repetition than the
    model's ``own``. None where there is no such point.
    """

    def room(point: Point) -> float:
        present, distinct = point.present.value / min_share, point.distinct / own.distinct
        return present + distinct - point.ratio / max_ratio

    least = MIN_DISTINCT * own.distinct
    fit = [
        point
        for point in points
        if point.broken == 0
        and point.ratio < max_ratio
        and point.distinct >= least
        and point.present.value >= min_share
    ]
    return max(fit, key=room, default=None)


def by_terms(terms: Sequence[str]) -> Present:
    """An answer that has one of ``terms`` as a word or words, whatever the case.

    Raises ``InvalidRequest`` where there are none.
    """
    wanted = [term.strip() for term in terms if term.strip()]
    if not wanted:
        raise InvalidRequest("name at least one term that shows the concept", param="terms")
    joined = "|".join(re.escape(term) for term in wanted)
    pattern = re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE)
    return lambda answers: [pattern.search(answer) is not None for answer in answers]


def by_reading(target: Target, tokenizer: Tokenizer, stream: Stream) -> Present:
    """An answer in which the unsteered model, reading it, has ``target`` active at some token."""

    def present(answers: Sequence[str]) -> Sequence[bool]:
        found = np.zeros(len(answers), bool)
        spoken = np.array([i for i, answer in enumerate(answers) if answer.strip()], np.int64)
        if len(spoken):
            texts = tokenize([answers[i] for i in spoken], tokenizer, stream.max_context)
            ((_, rows),) = read(texts, stream, (target.layer,))
            active = rows.x @ target.encoder + target.bias > target.threshold
            found[spoken[rows.text[active]]] = True
        return found.tolist()

    return present


def distinct_runs(answers: Sequence[str]) -> float:
    """Share of three-word runs that are different within their answer; 1 where none is."""
    runs, different = 0, 0
    for answer in answers:
        words = answer.lower().split()
        own = list(zip(words, words[1:], words[2:], strict=False))
        runs += len(own)
        different += len(set(own))
    return different / runs if runs else 1.0


@dataclass(frozen=True, eq=False)
class _Heard:
    """What a setting answered, and the nats of each answer's tokens."""

    answers: list[str | None]
    nats: list[NDArray[np.float64]]

    @property
    def mean_nats(self) -> float:
        """Over all tokens of all answers; infinite where there is none."""
        every = np.concatenate([np.empty(0), *self.nats])
        return float(every.mean()) if len(every) else float("inf")

    @property
    def means(self) -> NDArray[np.float64]:
        """Of each answer; NaN for an empty one."""
        return np.array([one.mean() if len(one) else np.nan for one in self.nats])


def _hear(model: Model, questions: Sequence[str], setting: Setting) -> _Heard:
    answers = model.answers(questions, setting)
    return _Heard(answers, model.nats(questions, [answer or "" for answer in answers]))


def _point(setting: Setting, heard: _Heard, present: Present, own: _Heard) -> Point:
    texts = [answer or "" for answer in heard.answers]
    differences = heard.means - own.means
    known = differences[np.isfinite(differences)]
    return Point(
        setting=setting,
        present=share(sum(map(bool, present(texts))), len(texts)),
        perplexity=_exp(heard.mean_nats),
        ratio=_exp(heard.mean_nats - own.mean_nats),
        median_ratio=_exp(float(np.median(known))) if len(known) else float("inf"),
        distinct=distinct_runs(texts),
        broken=sum(answer is None for answer in heard.answers),
        n=len(texts),
        examples=tuple(texts[:3]),
    )


def _exp(nats: float) -> float:
    return float(np.exp(nats))
