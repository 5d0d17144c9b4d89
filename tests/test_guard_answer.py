"""An answer is judged while it grows: nothing is forgotten, and what is broken is no pass."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fortpoint.config import Guard as GuardConfig
from fortpoint.errors import ConfigError, GuardFailed, ModelError
from fortpoint.guard.answer import TAIL_CHARS, Answer, Answers, AnswerThresholds, Thresholds
from fortpoint.guard.calibration import Mode
from fortpoint.guard.canaries import canary_variables, load_canaries
from fortpoint.guard.detector import Judgement, Passage
from fortpoint.guard.guard import ARTEFACTS, Guard
from fortpoint.guard.text_model import TextModel, buckets, canonical, features
from fortpoint.types import Reading, Review, Score

_N = 1 << 12
_MODE = Mode((1.0,), 0.0, 0.5, 0.9)
# Made for these tests; it opens nothing.
SECRET = "sk-fp-" + "Zq7Xw2Lm9Rt4Vb8Nc3Kd6Hs1Jf5Gp0Ya"
CANARY = "harbour-4711-lantern"


class _Harm:
    """Scores the text model's own logit, or the probe's where one is read, as they are."""

    name = "harmful_request"

    def judge(self, passage: Passage) -> Judgement:
        evidence = passage.text if passage.probes is None else passage.probes
        return Judgement(min(max(evidence[self.name], 0.0), 1.0), _MODE)


def _answers(canaries: dict[str, str] | None = None, **configured: float) -> Answers:
    """A text model that knows one word, ``detonator``."""
    table = np.zeros((_N, 1), np.float32)
    table[buckets(features(canonical("detonator")).hashes, _N)] = 3.0
    model = TextModel(("harmful_request",), table, np.zeros(1, np.float32))
    shipped = AnswerThresholds({"harmful_request": Thresholds(text=0.9, probes=0.6)})
    return Answers(model, [_Harm()], shipped, configured, canaries or {})


def _token(*logits: float) -> Reading:
    return Reading((), 1, struct.pack(f"<{len(logits)}f", *logits), ())


def _reviewed(answer: Answer, pieces: Sequence[str], every: int = 4) -> list[Review]:
    """The pieces as tokens, reviewed every so many and at the end."""
    reviews = []
    for number, piece in enumerate(pieces, 1):
        answer.add(piece, None)
        if number % every == 0:
            reviews.append(answer.review(final=False))
    return [*reviews, answer.review(final=True)]


def _score(review: Review, detector: str = "harmful_request") -> Score:
    return next(score for score in review.scores if score.detector == detector)


def _pieces(text: str, n: int) -> list[str]:
    return [text[at : at + n] for at in range(0, len(text), n)]


def test_answer_with_one_bad_word_among_many_is_flagged_and_stays_so() -> None:
    text = "all is well " * 200 + "the detonator is here " + "all is well " * 200
    reviews = _reviewed(_answers().begin(None), _pieces(text, 5))

    scores = [_score(review).score for review in reviews]
    assert scores[0] < 0.1
    assert all(later >= earlier for earlier, later in pairwise(scores))
    assert _score(reviews[-1]).flagged
    first = next(i for i, review in enumerate(reviews) if _score(review).flagged)
    assert first * 20 < text.index("detonator") + TAIL_CHARS


def test_answer_that_comes_in_one_piece_is_read_whole() -> None:
    text = "the detonator is here " + "all is well " * 2000
    (review,) = _reviewed(_answers().begin(None), [text])

    assert _score(review).flagged


def test_answer_without_text_has_scores_of_all_that_judges() -> None:
    answer = _answers().begin(None)
    review = answer.review(final=True)

    assert [score.detector for score in review.scores] == ["harmful_request", "secret", "canary"]
    assert (review.found, review.settled) == ((), 0)


def test_answer_probes_count_as_the_highest_mean_of_a_window() -> None:
    answer = _answers().begin(("other", "harmful_request"))
    logits = [0.0] * 100 + [1.0] * 64 + [0.0] * 300
    for number, logit in enumerate(logits, 1):
        answer.add(" word", _token(-9.0, logit))
        if number % 8 == 0:
            answer.review(final=False)

    assert _score(answer.review(final=True)).score == pytest.approx(1.0, abs=1e-6)


def test_answer_probes_in_a_short_answer_are_their_mean() -> None:
    answer = _answers().begin(("harmful_request",))
    for logit in (0.2, 0.4, 0.9):
        answer.add(" word", _token(logit))

    assert _score(answer.review(final=True)).score == pytest.approx(0.5)


def test_answer_threshold_depends_on_the_evidence() -> None:
    with_probes = _answers().begin(("harmful_request",))
    with_probes.add("x", _token(0.0))

    assert _score(with_probes.review(final=True)).threshold == 0.6
    assert _score(_answers().begin(None).review(final=True)).threshold == 0.9


@pytest.mark.parametrize("logits", [(), (1.0,), (1.0, 2.0, 3.0), (float("nan"), 0.0)])
def test_answer_reading_that_does_not_fit_is_a_failure(logits: tuple[float, ...]) -> None:
    answer = _answers().begin(("other", "harmful_request"))
    answer.add("x", _token(*logits))

    with pytest.raises(GuardFailed):
        answer.review(final=True)


def test_answer_that_is_not_read_any_more_is_a_failure() -> None:
    answer = _answers().begin(("harmful_request",))
    answer.add("x", _token(0.0))
    answer.add("held text of a stop condition", None)
    answer.review(final=False)
    answer.add("x", None)

    with pytest.raises(GuardFailed):
        answer.review(final=True)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("hidden", "detector"), [(SECRET, "secret"), (CANARY, "canary")])
def test_answer_secret_cut_anywhere_is_one_and_was_never_settled(
    size: int, hidden: str, detector: str
) -> None:
    text = f"Here it is: {hidden}. Do not tell."
    start = text.index(hidden)
    answer = _answers({"env:CANARY": CANARY}).begin(None)
    for piece in _pieces(text, size):
        answer.add(piece, None)
        review = answer.review(final=False)
        assert review.found or review.settled <= start
    review = answer.review(final=True)

    (found,) = review.found
    assert found.detector == detector
    assert (found.start, found.end) == (start, start + len(hidden))
    assert _score(review, detector).flagged
    assert review.settled == len(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80), st.lists(st.integers(1, 9), max_size=40))
def test_answer_any_text_around_a_secret_and_any_cut_finds_it(
    before: str, after: str, sizes: list[int]
) -> None:
    text, at = f"{before} {SECRET} {after}", 0
    answer = _answers().begin(None)
    for size in sizes:
        answer.add(text[at : at + size], None)
        at += size
        assert answer.review(final=False).settled <= at
    answer.add(text[at:], None)
    review = answer.review(final=True)

    start = len(before) + 1
    assert any(f.start <= start and f.end >= start + len(SECRET) for f in review.found)
    assert review.settled == len(text)


def test_answer_rule_below_its_threshold_is_scored_and_not_found() -> None:
    answer = _answers(secret=1.0).begin(None)
    answer.add(f"It is {SECRET} now.", None)
    review = answer.review(final=True)

    assert 0.5 < _score(review, "secret").score < 1
    assert review.found == ()
    assert not _score(review, "secret").flagged


def test_answer_configured_threshold_takes_the_shipped_ones_place() -> None:
    answer = _answers(harmful_request=0.0).begin(None)

    assert _score(answer.review(final=True)).flagged


def test_answer_threshold_of_an_unknown_detector_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'secret'"):
        _answers(secrets=0.5)


def test_answer_detectors_that_ship_exist_and_judge_an_ordinary_answer_as_clean() -> None:
    shipped = AnswerThresholds.load(ARTEFACTS / "answers.json")
    guard = Guard.load(GuardConfig())
    text = "The capital of France is Paris. It lies on the Seine, and about two million live there."
    reviews = _reviewed(guard.answer(None), _pieces(text, 4))

    assert set(shipped.detectors) <= set(guard.detectors)
    assert not any(score.flagged for score in reviews[-1].scores)


@pytest.mark.parametrize("content", [None, b"{", b'{"detectors": {"a": {"text": 1}}}', b"[]"])
def test_answer_thresholds_file_that_is_broken_is_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "answers.json"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ModelError, match=r"answers\.json"):
        AnswerThresholds.load(file)


def test_guard_that_was_not_made_for_answers_fails_rather_than_passes() -> None:
    guard = Guard.load(GuardConfig())
    bare = Guard(guard._text_model, guard._detectors)

    with pytest.raises(GuardFailed):
        bare.answer(None)


def test_canaries_are_read_from_where_they_are_named(tmp_path: Path) -> None:
    file = tmp_path / "canary"
    file.write_text(f"{CANARY}\n", encoding="utf-8")
    references = ("env:PLANTED", f"file:{file}")

    assert load_canaries(references, {"PLANTED": "fog-signal-1906"}) == {
        "env:PLANTED": "fog-signal-1906",
        f"file:{file}": CANARY,
    }
    assert canary_variables(references) == {"PLANTED"}


@pytest.mark.parametrize(
    "reference", [CANARY, "env:", "env:A B", "env:MISSING", "file:relative", "file:/nowhere", ""]
)
def test_canary_that_cannot_be_read_is_refused_and_never_repeated(reference: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_canaries((reference,), {"EMPTY": " "})

    assert CANARY not in refused.value.message


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"x" * 5000])
def test_canary_file_without_a_text_of_limited_length_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "canary"
    file.write_bytes(content)

    with pytest.raises(ConfigError):
        load_canaries((f"file:{file}",), {})
