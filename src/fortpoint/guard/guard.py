"""Decides whether a conversation may pass: who said what, how sure, above which threshold.

    guard = Guard.load(config.guard)
    verdict = guard.judge(messages, reading)       # before the first token is decoded

What is judged for what:

    user        jailbreak, injection, harmful_request
    tool        injection, jailbreak               (a document may report harm; it gives no orders)
    system      jailbreak, harmful_request, at the strict threshold, unless the role is trusted
    assistant   the same: a client can write the assistant's turn too

Each message is judged on its own, and all messages of the user joined, so that an attack cut
over several turns is seen whole. Does not protect: what the detectors miss (see
``artefacts/CARD.md``), and answers, which are not judged here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fortpoint import config as configuration
from fortpoint.errors import ConfigError, FortPointError, GuardFailed
from fortpoint.guard.calibration import Calibrations
from fortpoint.guard.detector import CombinedDetector, Detector, Passage
from fortpoint.guard.linear_probe import Readout, aggregate
from fortpoint.guard.text_model import TextModel
from fortpoint.types import Message, Reading, Role, Score, Verdict

ARTEFACTS = Path(__file__).parent / "artefacts"

_WATCHED: Mapping[Role, frozenset[str]] = {
    Role.USER: frozenset({"jailbreak", "injection", "harmful_request"}),
    Role.TOOL: frozenset({"jailbreak", "injection"}),
    Role.SYSTEM: frozenset({"jailbreak", "harmful_request"}),
    Role.ASSISTANT: frozenset({"jailbreak", "harmful_request"}),
}
_STRICT = frozenset({Role.SYSTEM, Role.ASSISTANT})

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class _Unit:
    """What is judged as one: the text and the messages it comes from."""

    role: Role
    text: str
    messages: tuple[int, ...]


class Guard:
    """Detectors, thresholds and the rules above. Holds no state of requests."""

    def __init__(
        self,
        text_model: TextModel,
        detectors: Sequence[Detector],
        thresholds: Mapping[str, float] | None = None,
        *,
        probes: bool = True,
    ) -> None:
        self._text_model = text_model
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
    def load(cls, config: configuration.Guard, artefacts: Path = ARTEFACTS) -> Guard:
        """From the shipped artefacts. Raises ``ModelError`` or ``ConfigError``."""
        calibrations = Calibrations.load(artefacts / "calibration.json")
        detectors = [CombinedDetector(name, one) for name, one in calibrations.detectors.items()]
        text_model = TextModel.load(artefacts / "text_model.safetensors")
        return cls(text_model, detectors, config.thresholds, probes=config.probes)

    @property
    def detectors(self) -> tuple[str, ...]:
        return tuple(detector.name for detector in self._detectors)

    @property
    def public_thresholds(self) -> dict[str, float]:
        """Detector to the score that blocks a user's text, with a reading."""
        return {
            d.name: self._thresholds.get(d.name, d.calibration.tail.threshold)
            for d in self._detectors
            if isinstance(d, CombinedDetector)
        }

    def judge(
        self,
        messages: Sequence[Message],
        reading: Reading | None,
        trusted: frozenset[Role] = frozenset(),
    ) -> Verdict:
        """The verdict on these messages. Does not raise: what cannot be judged is ``failed``."""
        failing = self._detectors[0].name if self._detectors else "guard"
        best: dict[str, Score] = {}
        try:
            readout = self._readout(reading)
            for unit in _units(messages, trusted):
                passage = self._passage(unit, readout)
                for detector in self._detectors:
                    failing = detector.name
                    if failing in _WATCHED[unit.role]:
                        score = self._score(detector, unit.role, passage)
                        best[failing] = max(best.get(failing, score), score, key=_rank)
        except (FortPointError, ArithmeticError, LookupError, TypeError, ValueError):
            return Verdict("failed", failing, ())
        scores = tuple(best[name] for name in self.detectors if name in best)
        flagged = [score for score in scores if score.flagged]
        if flagged:
            return Verdict("block", max(flagged, key=_rank).detector, scores)
        return Verdict("allow", None, scores)

    def _readout(self, reading: Reading | None) -> Readout | None:
        """None when the model has no probes at all, or they are turned off."""
        if reading is None or not self._probes or not reading.probes:
            return None
        return Readout.unpack(reading)

    def _passage(self, unit: _Unit, readout: Readout | None) -> Passage:
        logits = self._text_model.logits(unit.text).max(axis=0).tolist()
        text = dict(zip(self._text_model.detectors, logits, strict=True))
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
        return Score(detector.name, round(judgement.score, 6), threshold, role, flagged)


def _units(messages: Sequence[Message], trusted: frozenset[Role]) -> Iterator[_Unit]:
    """Each message that is judged, then the user's messages joined when there are several."""
    said = []
    for index, message in enumerate(messages):
        if message.role in trusted:
            continue
        yield _Unit(message.role, message.content, (index,))
        if message.role is Role.USER:
            said.append(index)
    if len(said) > 1:
        text = "\n".join(messages[index].content for index in said)
        yield _Unit(Role.USER, text, tuple(said))


def _named(readout: Readout, values: Float32) -> dict[str, float]:
    return {name: float(values[column]) for name, column in readout.probes.items()}


def _rank(score: Score) -> tuple[bool, float]:
    return score.flagged, score.score
