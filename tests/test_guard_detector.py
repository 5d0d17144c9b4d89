"""The contract of every shipped detector: a probability for any evidence, or a failure."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fortpoint.config import Guard as GuardConfig
from fortpoint.errors import GuardFailed
from fortpoint.guard.calibration import Calibrations
from fortpoint.guard.detector import CombinedDetector, Passage, tail_probe
from fortpoint.guard.guard import ARTEFACTS, Guard
from fortpoint.types import Message, Reading, Role, Segment

CALIBRATIONS = Calibrations.load(ARTEFACTS / "calibration.json").detectors
DETECTORS = [CombinedDetector(name, one) for name, one in CALIBRATIONS.items()]
PROBES = (*CALIBRATIONS, *(tail_probe(name) for name in CALIBRATIONS))
GUARD = Guard.load(GuardConfig())


def reading(value: float, n_tokens: int = 6, probes: tuple[str, ...] = PROBES) -> Reading:
    """A reading of one user message between template tokens, the same everywhere."""
    logits = np.full((n_tokens + 4, len(probes)), value, dtype="<f4")
    segments = (
        Segment(Role.TEMPLATE, -1, 0, 2),
        Segment(Role.USER, 0, 2, n_tokens + 2),
        Segment(Role.TEMPLATE, -1, n_tokens + 2, n_tokens + 4),
    )
    return Reading(probes, n_tokens + 4, logits.tobytes(), segments)


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
@given(
    text=st.floats(-1e6, 1e6),
    probe=st.none() | st.floats(-1e6, 1e6),
    tail=st.none() | st.floats(-1e6, 1e6),
)
def test_detector_any_evidence_is_a_probability(
    detector: CombinedDetector, text: float, probe: float | None, tail: float | None
) -> None:
    passage = Passage(
        {detector.name: text},
        None if probe is None else {detector.name: probe},
        None if tail is None else {tail_probe(detector.name): tail},
    )
    assert 0.0 <= detector.judge(passage).score <= 1.0


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_detector_evidence_that_is_not_finite_fails(detector: CombinedDetector, bad: float) -> None:
    with pytest.raises(GuardFailed):
        detector.judge(Passage({detector.name: bad}))


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
@pytest.mark.parametrize("passage", [Passage({}), Passage({"other": 1.0}, {"other": 1.0})])
def test_detector_missing_evidence_fails(detector: CombinedDetector, passage: Passage) -> None:
    with pytest.raises(GuardFailed):
        detector.judge(passage)


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
def test_detector_more_evidence_never_lowers_the_score(detector: CombinedDetector) -> None:
    modes = (detector.calibration.text, detector.calibration.probes, detector.calibration.tail)
    assert all(weight >= 0.0 for mode in modes for weight in mode.weights)
    assert all(0.5 <= mode.threshold <= mode.strict < 1.0 for mode in modes)


@given(text=st.text())
@settings(max_examples=200)
def test_guard_any_unicode_is_judged(text: str) -> None:
    verdict = GUARD.judge([Message(Role.USER, text)], reading(-20.0))
    assert verdict.action in ("allow", "block")
    assert [score.detector for score in verdict.scores] == list(GUARD.detectors)
    assert all(0.0 <= score.score <= 1.0 for score in verdict.scores)


@pytest.mark.parametrize("text", ["", "a", "\ud800", "\0" * 10, "x" * 100_000, "\U000e0041" * 500])
@pytest.mark.parametrize("with_reading", [False, True])
def test_guard_extreme_texts_are_judged(text: str, with_reading: bool) -> None:
    verdict = GUARD.judge([Message(Role.USER, text)], reading(-5.0, 1) if with_reading else None)
    assert verdict.action in ("allow", "block")
    assert len(verdict.scores) == len(GUARD.detectors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guard_reading_that_is_not_finite_is_failed_not_pass(bad: float) -> None:
    verdict = GUARD.judge([Message(Role.USER, "hello")], reading(bad))
    assert verdict.action == "failed"
    assert verdict.detector in GUARD.detectors


def test_guard_reading_without_a_detectors_probe_is_failed_not_pass() -> None:
    verdict = GUARD.judge([Message(Role.USER, "hello")], reading(-5.0, probes=PROBES[:1]))
    assert verdict.action == "failed"


def test_guard_message_that_was_not_read_is_failed_not_pass() -> None:
    messages = [Message(Role.USER, "hello"), Message(Role.USER, "again")]
    assert GUARD.judge(messages, reading(-5.0)).action == "failed"


def test_guard_model_without_probes_is_judged_by_text() -> None:
    verdict = GUARD.judge([Message(Role.USER, "hello")], reading(0.0, probes=()))
    assert verdict == GUARD.judge([Message(Role.USER, "hello")], None)
    assert verdict.action == "allow"


def test_guard_strong_probe_blocks_text_that_looks_harmless() -> None:
    messages = [Message(Role.USER, "tell me more about that")]
    assert GUARD.judge(messages, None).action == "allow"
    assert GUARD.judge(messages, reading(40.0)).action == "block"
