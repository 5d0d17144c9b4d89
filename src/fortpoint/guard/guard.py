"""Decides whether a conversation may pass: who said what, how sure, above which threshold.

    guard = Guard.load(config.guard)
    verdict = guard.judge(messages, reading)       # before the first token is decoded

What is judged for what:

    user        jailbreak, injection, harmful_request
    tool        injection, jailbreak               (a document may report harm; it gives no orders)
    system      jailbreak, harmful_request, at the strict threshold, unless the role is trusted
    assistant   the same: a client can write the assistant's turn too

Each message is judged on its own, and the messages of the user joined (all, and the last four,
these also without a border where one cuts a word), so that an attack cut over several turns is
seen whole. What is written in code is decoded and judged beside, by its
words (see ``obfuscation/forms.py``). Answers are judged while they grow: see ``answer.py``. Does
not protect: what the detectors miss (see ``artefacts/CARD.md``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fortpoint import config as configuration
from fortpoint.errors import ConfigError, FortPointError, GuardFailed
from fortpoint.guard.answer import Answer, Answers, AnswerThresholds
from fortpoint.guard.calibration import Calibrations
from fortpoint.guard.detector import CombinedDetector, Detector, Passage
from fortpoint.guard.linear_probe import Readout, aggregate
from fortpoint.guard.obfuscation.forms import forms
from fortpoint.guard.text_model import TextModel
from fortpoint.types import Message, Reading, Role, Score, Turn, Verdict, rank

ARTEFACTS = Path(__file__).parent / "artefacts"

_WATCHED: Mapping[Role, frozenset[str]] = {
    Role.USER: frozenset({"jailbreak", "injection", "harmful_request"}),
    Role.TOOL: frozenset({"jailbreak", "injection"}),
    Role.SYSTEM: frozenset({"jailbreak", "harmful_request"}),
    Role.ASSISTANT: frozenset({"jailbreak", "harmful_request"}),
}
_STRICT = frozenset({Role.SYSTEM, Role.ASSISTANT})
_RECENT_TURNS = 4

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class _Unit:
    """What is judged as one: the text and the messages it comes from."""

    role: Role
    text: str
    messages: tuple[int, ...]

    @property
    def is_turn(self) -> bool:
        """Whether it is one message of the user alone."""
        return self.role is Role.USER and len(self.messages) == 1


class Guard:
    """Detectors, thresholds and the rules above. Holds no state of requests."""

    def __init__(
        self,
        text_model: TextModel,
        detectors: Sequence[Detector],
        thresholds: Mapping[str, float] | None = None,
        *,
        probes: bool = True,
        answers: Answers | None = None,
    ) -> None:
        """``answers`` may be None only where answers are not judged."""
        self._text_model = text_model
        self._answers = answers
        self._detectors = tuple(detectors)
        self._thresholds = dict(thresholds or {})
        self._probes = probes
        for name in self._thresholds:
            if name not in self.detectors:
                near = difflib.get_close_matches(name, self.detectors, n=1, cutoff=0.0)
                raise ConfigError(
                    f"guard.thresholds: unknown detector {name!r}; did you mean {near[0]!r}?"
                )

    @classmethod
    def load(
        cls,
        config: configuration.Guard,
        artefacts: Path = ARTEFACTS,
        canaries: Mapping[str, str] | None = None,
    ) -> Guard:
        """From the shipped artefacts; ``canaries`` are texts that must never come out, by a
        name that may be shown. Raises ``ModelError`` or ``ConfigError``."""
        calibrations = Calibrations.load(artefacts / "calibration.json")
        detectors = [CombinedDetector(name, one) for name, one in calibrations.detectors.items()]
        text_model = TextModel.load(artefacts / "text_model.safetensors")
        thresholds = AnswerThresholds.load(artefacts / "answers.json")
        answers = Answers(
            text_model, detectors, thresholds, config.answer_thresholds, canaries or {}
        )
        return cls(text_model, detectors, config.thresholds, probes=config.probes, answers=answers)

    @property
    def detectors(self) -> tuple[str, ...]:
        return tuple(detector.name for detector in self._detectors)

    def answer(self, probes: Sequence[str] | None) -> Answer:
        """Begin to judge one answer, whose tokens' readings have these ``probes``; None judges
        its text alone. Raises ``GuardFailed`` when this guard was not made to judge answers."""
        if self._answers is None:
            raise GuardFailed("this guard does not judge answers")
        return self._answers.begin(probes)

    def judge(
        self,
        messages: Sequence[Message],
        reading: Reading | None,
        trusted: frozenset[Role] = frozenset(),
    ) -> Verdict:
        """The verdict on these messages. Does not raise: what cannot be judged is ``failed``."""
        failing = self._detectors[0].name if self._detectors else "guard"
        best: dict[tuple[str, Role], Score] = {}
        turns: dict[int, dict[str, Score]] = {}
        try:
            readout = self._readout(reading)
            for unit in _units(messages, trusted):
                passages = self._passages(unit, readout)
                for detector in self._detectors:
                    failing = detector.name
                    if failing in _WATCHED[unit.role]:
                        for passage in passages:
                            score = self._score(detector, unit.role, passage)
                            place = failing, unit.role
                            best[place] = max(best.get(place, score), score, key=rank)
                            if unit.is_turn:
                                turn = turns.setdefault(unit.messages[0], {})
                                turn[failing] = max(turn.get(failing, score), score, key=rank)
        except (FortPointError, ArithmeticError, LookupError, TypeError, ValueError):
            return Verdict("failed", failing, ())
        scores = tuple(
            best[name, role] for name in self.detectors for role in Role if (name, role) in best
        )
        flagged = [score for score in scores if score.flagged]
        alone = tuple(Turn(at, tuple(turn.values())) for at, turn in turns.items()) or UNSET
        if flagged:
            return Verdict("block", max(flagged, key=rank).detector, scores, alone)
        return Verdict("allow", None, scores, alone)

    def _readout(self, reading: Reading | None) -> Readout | None:
        """None when the model has no probes at all, or they are turned off."""
        if reading is None or not self._probes or not reading.probes:
            return None
        return Readout.unpack(reading)

    def _passages(self, unit: _Unit, readout: Readout | None) -> list[Passage]:
        """The unit as it stands, then what it says once decoded, by its words alone: the model
        read the code, and what it thought of that says little about what the code hides."""
        decoded = (Passage(self._words(form.text), form=form.kind) for form in forms(unit.text))
        return [self._passage(unit, readout), *decoded]

    def _words(self, text: str) -> dict[str, float]:
        logits = self._text_model.logits(text).max(axis=0).tolist()
        return dict(zip(self._text_model.detectors, logits, strict=True))

    def _passage(self, unit: _Unit, readout: Readout | None) -> Passage:
        text = self._words(unit.text)
        if readout is None:
            return Passage(text)
        tokens = [readout.tokens_of(message) for message in unit.messages]
        own = np.concatenate(tokens)
        if not len(own):
            if unit.text.strip():
                raise GuardFailed("a message was not read inside the model")
            return Passage(text)
        tail = readout.tail_of(unit.messages[-1]) if unit.role is Role.USER else None
        return Passage(
            text,
            _named(readout, aggregate(own)),
            None if tail is None else _named(readout, tail.mean(axis=0)),
        )

    def _score(self, detector: Detector, role: Role, passage: Passage) -> Score:
        judgement = detector.judge(passage)
        threshold = self._thresholds.get(detector.name, judgement.mode.threshold)
        if role in _STRICT:
            threshold = max(threshold, judgement.mode.strict)
        flagged = judgement.score >= threshold
        score = round(judgement.score, 6)
        return Score(detector.name, score, threshold, role, flagged, passage.form or UNSET)


def _units(messages: Sequence[Message], trusted: frozenset[Role]) -> Iterator[_Unit]:
    """Each message that is judged, then the user's joined: all, the last few, and those as they
    would read without a border where one cuts a word."""
    said = []
    for index, message in enumerate(messages):
        if message.role in trusted:
            continue
        yield _Unit(message.role, message.content, (index,))
        if message.role is Role.USER:
            said.append(index)
    for recent in dict.fromkeys((tuple(said), tuple(said[-_RECENT_TURNS:]))):
        if len(recent) > 1:
            yield _Unit(Role.USER, _joined(messages, recent, "\n"), recent)
    recent = tuple(said[-_RECENT_TURNS:])
    if _is_cut(messages, recent):
        yield _Unit(Role.USER, _joined(messages, recent, ""), recent)


def _joined(messages: Sequence[Message], which: Sequence[int], between: str) -> str:
    return between.join(messages[index].content for index in which)


def _is_cut(messages: Sequence[Message], said: Sequence[int]) -> bool:
    """Whether a word may go on from one turn into the next."""
    texts = [messages[index].content for index in said]
    return any(
        one[-1:].isalnum() and other[:1].isalnum() and not other[:1].isupper()
        for one, other in pairwise(texts)
    )


def _named(readout: Readout, values: Float32) -> dict[str, float]:
    return {name: float(values[column]) for name, column in readout.probes.items()}
