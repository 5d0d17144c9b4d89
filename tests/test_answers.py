"""Answers: n of them, their ends, their log-probabilities, and what is read beside each token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine_bench import MODELS, N_FEATURES, Bench, ask, logits_of, make_folder, probes
from fortpoint.engine.model import Span, Step
from fortpoint.engine.protocol import Condition, Done, Prefilled, Steer, Token, Watch
from fortpoint.types import Message, Role
from reference_model import ReferenceModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("answers"))


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _probe_logits(seen: dict[int, np.ndarray]) -> np.ndarray:
    """The probes' formula in double precision."""
    made = probes()
    x = {layer: seen[layer].astype(np.float64) for layer in made.layers}
    rms = {layer: np.sqrt(np.mean(x[layer] ** 2, axis=1, keepdims=True) + 1e-6) for layer in x}
    W = np.random.default_rng(3).normal(size=(2, 2, x[0].shape[1])).astype(np.float32)
    return np.array([0.5, -0.5]) + sum(x[at] / rms[at] @ W[i].T for i, at in enumerate((0, 2)))


def _computed(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[n, vocab]`` and the probes' ``[n, 2]`` of these tokens, by the reference."""
    model = ReferenceModel()
    cache, n = model.new_cache(), len(tokens)
    assert cache.reserve(n)
    result = model.forward(Step(tokens, [Span(cache, 0, n)], range(n), (0, 2)))
    return result.logits, _probe_logits(dict(result.seen))


def test_every_counted_token_is_one_event(folder: Path, kind: str) -> None:
    """Also those without text: parts of a character, of a stop string, the end."""
    bench = Bench(folder, kind)
    bench.submit(ask("r", "hello", max_tokens=200, temperature=2.0, seed=2, n=3))
    bench.run()
    tokens = [event for event in bench.events["r"] if isinstance(event, Token)]
    done = bench.events["r"][-1]
    assert isinstance(done, Done)
    assert len(tokens) == done.usage.completion
    assert any(not token.text for token in tokens)


def test_n_answers_differ_and_repeat_with_their_seed(folder: Path, kind: str) -> None:
    def answers() -> list[str]:
        bench = Bench(folder, kind)
        bench.submit(ask("r", "hello", temperature=1.0, seed=5, n=3))
        bench.run()
        return [bench.text("r", choice) for choice in range(3)]

    first = answers()
    assert first == answers()
    assert len(set(first)) == 3


def test_n_answers_share_one_prefill(folder: Path) -> None:
    bench = Bench(folder)
    bench.submit(ask("r", "hello", temperature=1.0, seed=5, n=4, max_tokens=6))
    bench.run()
    assert isinstance(bench.model, ReferenceModel)
    n_prompt = len(bench.tokenizer.chat([Message(Role.USER, "hello")]).tokens)
    assert sum(len(step.tokens) for step in bench.model.steps) == n_prompt + 4 * 5


def test_stop_string_ends_the_answer_before_it(folder: Path) -> None:
    whole = Bench(folder)
    whole.submit(ask("r", "hello", max_tokens=30))
    whole.run()
    stop = whole.text("r")[3:5]
    bench = Bench(folder)
    bench.submit(ask("r", "hello", max_tokens=30, stop=(stop,)))
    bench.run()
    assert bench.text("r") == whole.text("r").split(stop, maxsplit=1)[0]
    assert bench.reasons("r") == ["stop"]


def test_logprobs_are_the_models_own(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind)
    bench.submit(ask("r", "hello", max_tokens=4, temperature=1.0, seed=1, logprobs=3))
    bench.step()
    (sequence,) = bench.scheduler.running
    bench.run()
    logits = _computed(sequence.tokens[:-1])[0][sequence.n_prompt - 1 :].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen = sequence.tokens[sequence.n_prompt :]
    for token, number, row in zip(bench.tokens("r"), chosen, expected, strict=True):
        assert token.top is not None
        assert len(token.top) == 3
        assert [p for _, p in token.top] == pytest.approx(np.sort(row)[::-1][:3], abs=0.006)
        assert token.token == bench.tokenizer.decode([number])
        assert token.logprob == pytest.approx(row[number], abs=0.006)


def test_logprobs_are_absent_unless_asked_for(folder: Path) -> None:
    bench = Bench(folder)
    bench.submit(ask("r", "hello"))
    bench.run()
    assert {(t.token, t.logprob, t.top) for t in bench.tokens("r")} == {(None, None, None)}


def test_schema_holds_every_answer(folder: Path, kind: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    bench = Bench(folder, kind, max_batch=4)
    bench.submit(ask("free", "hello", max_tokens=40))
    text = json.dumps(schema)
    bench.submit(ask("r", "hello", max_tokens=400, temperature=1.0, seed=3, n=3, json_schema=text))
    bench.run()
    for choice in range(3):
        answer = json.loads(bench.text("r", choice))
        assert answer["a"] in ("x", "yy")
        assert isinstance(answer["b"], bool)
    assert bench.reasons("r") == ["stop"] * 3
    alone = Bench(folder, kind)
    alone.submit(ask("free", "hello", max_tokens=40))
    alone.run()
    assert bench.text("free") == alone.text("free")


def test_stop_when_ends_the_answer_where_its_condition_holds(folder: Path, kind: str) -> None:
    watch = Watch(("sae",), top=N_FEATURES)
    whole = Bench(folder, kind)
    whole.submit(ask("r", "hello", max_tokens=30, watch=watch))
    whole.run()
    read = [_features(token)[1] for token in whole.tokens("r")]
    # A token's own features are read where the next one is chosen.
    feature = next(f for f in range(N_FEATURES) if read[3].get(f, 0) > 0.2 > read[1].get(f, 0))
    expected = next(i for i in range(1, 30) if read[i].get(feature, 0) > 0.2)
    bench = Bench(folder, kind)
    bench.submit(ask("r", "hello", max_tokens=30, stop_when=(Condition(f"sae/{feature}", 0.2),)))
    bench.submit(ask("other", "hello", max_tokens=30))
    bench.run()
    assert bench.reasons("r") == ["stop_when"]
    assert len(bench.tokens("r")) == expected
    assert whole.text("r").startswith(bench.text("r"))
    assert bench.text("other") == whole.text("r")


def test_stop_when_gives_out_what_was_held_back(folder: Path) -> None:
    whole = Bench(folder)
    for seed in range(30):
        whole.submit(ask(f"{seed}", "hello", max_tokens=1, temperature=2.0, seed=seed))
    whole.run()
    seed = next(i for i in range(30) if whole.text(f"{i}").isascii())
    first = whole.text(f"{seed}")
    bench = Bench(folder)
    always = (Condition("sae/0", -1.0),)
    wish = ask("r", "hello", 9, 2.0, seed=seed, stop=(first + "END",), stop_when=always)
    bench.submit(wish)
    bench.run()
    assert bench.text("r") == first
    assert bench.reasons("r") == ["stop_when"]
    done = bench.events["r"][-1]
    assert isinstance(done, Done)
    assert done.usage.completion == len(bench.tokens("r")) == 2


def _features(token: Token) -> tuple[list[int], dict[int, float]]:
    assert token.reading is not None
    (part,) = token.reading.features
    indices = np.frombuffer(part.indices, "<i4")
    values = np.frombuffer(part.values, "<f4")
    assert len(indices) == len(values) == part.top
    active = indices >= 0
    pairs = zip(indices[active].tolist(), values[active].tolist(), strict=True)
    return indices.tolist(), dict(pairs)


def test_reading_of_each_token_is_the_probes_at_the_row_that_chose_it(
    folder: Path, kind: str
) -> None:
    bench = Bench(folder, kind)
    bench.submit(ask("r", "hello", max_tokens=8))
    bench.step()
    (sequence,) = bench.scheduler.running
    bench.run()
    n_prompt = sequence.n_prompt
    expected = _computed(sequence.tokens)[1]
    for i, token in enumerate(bench.tokens("r")):
        assert token.reading is not None
        assert (token.reading.probes, token.reading.segments) == ((), ())
        np.testing.assert_allclose(
            logits_of(token.reading)[0], expected[n_prompt - 1 + i], atol=1e-3
        )


def test_reading_is_absent_where_it_is_not_asked_for(folder: Path) -> None:
    bench = Bench(folder)
    bench.submit(ask("r", "hello", read=False))
    bench.run()
    (prefilled,) = (e for e in bench.events["r"] if isinstance(e, Prefilled))
    assert prefilled.reading is None
    assert all(token.reading is None for token in bench.tokens("r"))


def test_watched_features_come_with_prompt_and_tokens(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind, chunk=16)
    bench.submit(ask("r", "x" * 40, max_tokens=5, watch=Watch(("sae",), top=4)))
    bench.run()
    reading = bench.reading("r")
    (part,) = reading.features
    assert len(part.indices) == len(part.values) == 4 * 4 * reading.n_tokens
    last = np.frombuffer(part.values, "<f4")[-4:]
    first = np.frombuffer(bench.tokens("r")[0].reading.features[0].values, "<f4")  # type: ignore[union-attr]
    np.testing.assert_array_equal(last, first)
    assert all(np.all(np.diff(list(_features(t)[1].values())) <= 0) for t in bench.tokens("r"))


_ALIGNED = 23  # of the bench's features the one whose decoder is most along its encoder


def test_steering_moves_what_is_watched(folder: Path, kind: str) -> None:
    def reads(steer: tuple[Steer, ...]) -> float:
        bench = Bench(folder, kind)
        watch = Watch(("sae",), top=N_FEATURES)
        bench.submit(ask("r", "hello", max_tokens=3, watch=watch, steer=steer))
        bench.run()
        return _features(bench.tokens("r")[-1])[1].get(_ALIGNED, 0.0)

    # The decoder is not the encoder: a clamp does not read back exactly, but it moves.
    assert reads((Steer("clamp", f"sae/{_ALIGNED}", 4.0),)) > reads(())


@pytest.mark.parametrize("wish", [{"top": 0}, {"top": 10_000}, {"dictionaries": ("absent",)}])
def test_watch_of_what_is_not_here_is_refused(folder: Path, wish: dict[str, object]) -> None:
    bench = Bench(folder)
    watch = Watch(**({"dictionaries": ("sae",)} | wish))  # type: ignore[arg-type]
    bench.submit(ask("r", "hello", watch=watch))
    assert bench.failure("r").code == "invalid_request"
