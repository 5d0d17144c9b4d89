"""What a detector is: a name, and a probability for one passage of evidence.

Every detector answers for any text and any reading with a number in 0..1 or raises
``GuardFailed``; it never passes what it could not judge. ``tests/test_guard_detector.py`` is
the contract that each must pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import GuardFailed
from fortpoint.guard.calibration import Calibration, Mode

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Passage:
    """All evidence about one message, or about several joined.

    ``text`` holds each text model's highest logit over the windows; ``probes`` each probe's
    aggregate over the message's tokens; ``tail`` what it is at the template's last token after
    them. The last two are None where there is no reading. ``form`` names the codes that the
    text was decoded from; empty where it stands as it is.
    """

    text: Mapping[str, float]
    probes: Mapping[str, float] | None = None
    tail: Mapping[str, float] | None = None
    form: str = ""


@dataclass(frozen=True)
class Judgement:
    """A probability and the mode (with its thresholds) that it was computed in."""

    score: float
    mode: Mode


class Detector(Protocol):
    """One thing to look for. ``judge`` raises ``GuardFailed`` when it cannot tell."""

    @property
    def name(self) -> str: ...

    def judge(self, passage: Passage) -> Judgement: ...


@dataclass(frozen=True)
class CombinedDetector:
    """A text model and linear probes, joined by a logistic function."""

    name: str
    calibration: Calibration

    def judge(self, passage: Passage) -> Judgement:
        try:
            logits = [passage.text[self.name]]
            if passage.probes is not None:
                logits.append(passage.probes[self.name])
                if passage.tail is not None:
                    logits.append(passage.tail[tail_probe(self.name)])
        except KeyError as error:
            raise GuardFailed(f"the detector {self.name} lacks evidence {error}") from None
        mode = self.calibration.mode(len(logits))
        return Judgement(mode.probability(logits), mode)


def tail_probe(detector: str) -> str:
    """The name of the probe that a detector reads on the template's tokens."""
    return f"{detector}/tail"
