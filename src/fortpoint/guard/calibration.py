"""From a detector's raw logits to a probability, and the thresholds it is compared with.

    calibration.json
    {"detectors": {"jailbreak": {"text": {...}, "probes": {...}, "tail": {...}}, ...}}

Each detector has one ``Mode`` for each kind of evidence there is: ``text`` alone, ``probes``
(text and the message's tokens) and ``tail`` (both and the template tokens after it). A mode is
a logistic function of its logits, fitted on scores of families the models were not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fortpoint.errors import GuardFailed, ModelError


class Mode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``sigmoid(bias + sum(weights * logits))``; logits in the order text, probes, tail.

    ``threshold`` applies to what users and tools say; ``strict``, the higher, to system and
    assistant text that a client supplies.
    """

    weights: tuple[float, ...]
    bias: float
    threshold: float
    strict: float

    def probability(self, logits: Sequence[float]) -> float:
        """In 0..1. Raises ``GuardFailed`` for logits that are missing or not finite."""
        if len(logits) != len(self.weights):
            raise GuardFailed("a detector was given other evidence than it was calibrated for")
        z = self.bias + math.fsum(w * x for w, x in zip(self.weights, logits, strict=True))
        if not math.isfinite(z):
            raise GuardFailed("a detector's evidence is not finite")
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, z))))


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One detector's modes."""

    text: Mode
    probes: Mode
    tail: Mode

    def mode(self, n_logits: int) -> Mode:
        """The mode for this many kinds of evidence."""
        return (self.text, self.probes, self.tail)[n_logits - 1]


class Calibrations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every detector's calibration, in the order in which they are reported."""

    detectors: dict[str, Calibration]

    @classmethod
    def load(cls, file: Path) -> Calibrations:
        """Raises ``ModelError`` when the file is missing or not of this form."""
        try:
            return msgspec.json.decode(file.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise ModelError(f"the guard's {file.name} cannot be read: {error}") from error
