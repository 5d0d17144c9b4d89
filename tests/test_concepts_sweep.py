"""A sweep finds the weakest strength that shows the concept and keeps the text sane."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import engine_bench
from concept_world import BEST_LAYER, POSITIVES, Words, World, sentence
from fortpoint.config import Engine
from fortpoint.engine.offline import Offline
from fortpoint.engine.protocol import Generate, Sampling, ScoreText, Steer
from fortpoint.engine.steered_answers import SteeredAnswers
from fortpoint.errors import InvalidRequest, SteeringDiverged
from fortpoint.features.concepts.examples import Examples
from fortpoint.features.concepts.learn import Settings, learn
from fortpoint.features.concepts.sweep import (
    Setting,
    by_reading,
    by_terms,
    distinct_runs,
    sweep,
)
from fortpoint.features.library import Library
from fortpoint.types import Message, Role
from reference_model import ReferenceModel

QUESTIONS = [f"question {n}" for n in range(10)]
BRIDGE = by_terms(["bridge", "the bay"])


class Turned:
    """At strength s, the first 2 s answers of ten are about the bridge, at s/4 nats a token."""

    def __init__(self, breaks_at: float = 99.0) -> None:
        self.breaks_at = breaks_at
        self.asked: list[Setting] = []

    def answers(self, questions: Sequence[str], setting: Setting) -> list[str | None]:
        self.asked.append(setting)
        if setting.strength >= self.breaks_at:
            return [None, *["la la la la la"] * (len(questions) - 1)]
        shown = 2 * setting.strength
        loop = "one two three four five six" + " la" * round(setting.strength)
        return [
            f"The Bridge {loop} {setting.strength}" if n < shown else f"tea {setting.strength}"
            for n in range(len(questions))
        ]

    def nats(self, questions: Sequence[str], answers: Sequence[str]) -> list[np.ndarray]:
        return [self._nats(answer) for answer in answers]

    @staticmethod
    def _nats(answer: str) -> np.ndarray:
        if not answer:
            return np.empty(0)
        strength = 8.0 if answer.startswith("la") else float(answer.rsplit(maxsplit=1)[-1])
        return np.full(5, 0.5 + strength / 4)


def settings(*strengths: float) -> list[Setting]:
    return [Setting(("bridge",), strength) for strength in strengths]


def test_strength_that_is_present_and_sane_is_recommended() -> None:
    report = sweep(Turned(), QUESTIONS, settings(6, 1, 4, 4.2, 5), BRIDGE)
    assert [point.setting.strength for point in report.points] == [1, 4, 4.2, 5, 6]
    assert [point.present.value for point in report.points] == [0.2, 0.8, 0.9, 1.0, 1.0]
    assert report.recommended is not None
    assert report.recommended.setting.strength == 4.2
    assert report.recommended.ratio == pytest.approx(np.exp(1.05))
    assert report.own.ratio == 1.0
    assert report.own.present.value == 0.0
    assert report.own.perplexity == pytest.approx(np.exp(0.5))


def test_nothing_is_recommended_where_presence_costs_too_much() -> None:
    report = sweep(Turned(), QUESTIONS, settings(1, 5, 6), BRIDGE)
    assert report.recommended is None


def test_stronger_settings_of_a_kind_that_lost_its_mind_are_not_tried() -> None:
    model = Turned()
    kinds = [*settings(4, 11, 12), Setting(("bridge",), 12.0, mode="add")]
    report = sweep(model, QUESTIONS, kinds, BRIDGE)
    tried = [(s.mode, s.strength) for s in model.asked[1:]]
    assert tried == [("clamp", 4), ("clamp", 11), ("add", 12)]
    assert len(report.points) == 3


def test_loop_is_no_sane_text_however_likely() -> None:
    class Loops(Turned):
        def answers(self, questions: Sequence[str], setting: Setting) -> list[str | None]:
            if not setting.targets:
                return [f"tea and cake and jam {n} 0" for n in range(len(questions))]
            return ["the bridge the bridge the bridge the bridge 0"] * len(questions)

    report = sweep(Loops(), QUESTIONS, settings(4), BRIDGE)
    assert report.points[0].ratio == pytest.approx(1.0)
    assert report.points[0].present.value == 1.0
    assert report.points[0].distinct < 0.6
    assert report.recommended is None


def test_broken_answers_are_counted_and_never_recommended() -> None:
    report = sweep(Turned(breaks_at=2.0), QUESTIONS, settings(2), by_terms(["la"]), max_ratio=99)
    (point,) = report.points
    assert (point.broken, point.n) == (1, 10)
    assert point.present.value == 0.9
    assert point.distinct == pytest.approx(1 / 3)
    assert report.recommended is None


def test_median_ratio_is_over_questions() -> None:
    report = sweep(Turned(), QUESTIONS, settings(4), BRIDGE)
    assert report.points[0].median_ratio == pytest.approx(np.exp(1.0))


@pytest.mark.parametrize(("questions", "strengths"), [([], (1.0,)), (QUESTIONS, ())])
def test_sweep_of_nothing_is_refused(questions: list[str], strengths: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequest, match="at least one question"):
        sweep(Turned(), questions, settings(*strengths), BRIDGE)


def test_terms_are_whole_words_in_any_case() -> None:
    answers = ["A BRIDGE.", "abridged", "on the Bay of Pigs", "the bayonet", "tea", ""]
    assert BRIDGE(answers) == [True, False, True, False, False, False]
    with pytest.raises(InvalidRequest, match="at least one term"):
        by_terms([" "])


def test_terms_are_no_patterns() -> None:
    assert by_terms(["a.b", "c++"])(["axb", "a.b", "use c++ here"]) == [False, True, True]


def test_concept_is_read_in_answers() -> None:
    settings = Settings(layers=(BEST_LAYER,))
    concept = learn(Examples(POSITIVES), Words(), World(), settings)
    library = Library({}, {"bridge": concept.direction("bridge", "tiny")})
    present = by_reading(library.resolve("bridge"), Words(), World())
    answers = [sentence(90, "bridge"), "", sentence(91), sentence(92, "tower"), "  "]
    assert present(answers) == [True, False, False, True, False]
    assert present(["", " "]) == [False, False]


@pytest.mark.parametrize(
    ("answers", "share"),
    [(["a b c d"], 1.0), (["a b c a b c a b c"], 3 / 7), (["a b"], 1.0), ([], 1.0)],
)
def test_distinct_runs_notice_a_loop(answers: list[str], share: float) -> None:
    assert distinct_runs(answers) == pytest.approx(share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_bench.make_folder(tmp_path_factory.mktemp("offline"))


@pytest.fixture
def offline(folder: Path):
    model = ReferenceModel(8192, 512)
    tokenizer = engine_bench.tokenizer(folder)
    engine = Offline(model, tokenizer, engine_bench.library(), Engine(max_batch=4))
    yield engine
    engine.close()


def ask(name: str, text: str, *steer: Steer) -> Generate:
    sampling = Sampling(8, temperature=0.0)
    message = (Message(Role.USER, text),)
    return Generate(name, sampling, messages=message, read=False, hold=False, steer=steer)


def test_offline_engine_answers_as_the_served_one(folder: Path, offline: Offline) -> None:
    bench = engine_bench.Bench(folder)
    asked = [ask(f"r{n}", f"hello {n}") for n in range(9)]
    told: list[int] = []
    answers = offline.answer(asked, told.append)
    for request in asked:
        bench.submit(request)
    bench.run()
    assert answers == [bench.text(request.id) for request in asked]
    assert told[-1] == 9
    assert told == sorted(told)


def test_offline_engine_scores_as_the_served_one(folder: Path, offline: Offline) -> None:
    bench = engine_bench.Bench(folder)
    request = ScoreText("s", " and so on", messages=(Message(Role.USER, "hello"),))
    (logprobs,) = offline.score([request])
    bench.submit(request)
    bench.run()
    np.testing.assert_allclose(logprobs, bench.events["s"][-1].logprobs, atol=1e-6)


def test_offline_engine_says_which_answer_its_steering_broke(offline: Offline) -> None:
    object.__setattr__(offline.library.directions["calm"], "training_max", 1e37)
    broken = ask("b", "hello", Steer("add", "calm", 100.0))
    assert offline.answer([ask("a", "hello"), broken])[1] is None
    score = ScoreText("s", "x", prompt="hello", steer=(Steer("add", "calm", 100.0),))
    with pytest.raises(SteeringDiverged):
        offline.score([score])
    assert offline.answer([ask("c", "hello")])[0] is not None


def test_offline_engine_refuses_what_the_served_one_refuses(offline: Offline) -> None:
    with pytest.raises(InvalidRequest, match="no direction 'absent'"):
        offline.answer([ask("r", "hello", Steer("add", "absent", 1.0))])
    with pytest.raises(InvalidRequest, match="strength"):
        offline.answer([ask("r", "hello", Steer("add", "calm", 1000.0))])
    assert offline.answer([ask("r", "hello")])[0] is not None


def test_steered_answers_differ_and_are_scored_unsteered(offline: Offline) -> None:
    model = SteeredAnswers(offline, max_tokens=8)
    plain = model.answers(["hello", "you"], Setting())
    turned = model.answers(["hello", "you"], Setting(("calm",), 50.0, "add"))
    assert plain != turned
    nats = model.nats(["hello", "you"], [plain[0] or "", ""])
    assert len(nats) == 2
    assert len(nats[1]) == 0
    assert np.isfinite(nats[0]).all()
    assert (nats[0] >= 0).all()
    prompted = model.answers(["hello", "you"], Setting(system="Talk of tea."))
    assert prompted != plain
