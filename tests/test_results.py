"""Scores, embeddings and scans are what an independent implementation computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_model
from engine_bench import MODELS, Bench, ask, make_folder
from fortpoint.engine.protocol import Done, Embed, Embedded, Scan, Scored, ScoreText, Steer
from fortpoint.types import Message, Role
from reference_model import ReferenceModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("results"))


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def transformers_model() -> LlamaForCausalLM:
    config = tiny_model.config()
    made = LlamaForCausalLM(LlamaConfig(**config)).eval()
    made.load_state_dict(tiny_model.weights(config), strict=False)
    return made


def score(bench: Bench, request: ScoreText) -> Scored:
    bench.submit(request)
    bench.run()
    (event,) = bench.events[request.id]
    assert isinstance(event, Scored), event
    return event


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("prompt", ["", "a prompt", None])
def test_score_equals_transformers_log_softmax(
    folder: Path, kind: str, transformers_model: LlamaForCausalLM, chunk: int, prompt: str | None
) -> None:
    continuation = " and then " * 5
    bench = Bench(folder, kind, chunk=chunk)
    messages = (Message(Role.USER, "hi"),) if prompt is None else None
    scored = score(bench, ScoreText("s", continuation, messages=messages, prompt=prompt))

    read = bench.tokenizer.chat(messages) if messages else bench.tokenizer.text(prompt or "")
    before, after = list(read.tokens), bench.tokenizer.encode_text(continuation)
    with torch.inference_mode():
        logits = transformers_model(torch.tensor([before + after])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    whole = before + after
    first = max(len(before), 1)
    expected = [float(logprobs[i - 1, whole[i]]) for i in range(first, len(whole))]
    np.testing.assert_allclose(scored.logprobs, expected, atol=1e-3)
    assert "".join(scored.tokens) == bench.tokenizer.decode(whole[first:])
    assert (scored.usage.prompt, scored.usage.completion) == (len(before), len(after))
    assert bench.n_used == 0


def test_score_is_the_same_in_company_and_when_evicted(folder: Path, kind: str) -> None:
    request = ScoreText("s", "z" * 100, prompt="hello", tenant="t")
    alone = score(Bench(folder, kind), request)
    bench = Bench(folder, kind, n_tokens=256, max_context=256, chunk=16)
    bench.submit(ask("long", "hello", max_tokens=120, tenant="t"))
    bench.step(3)
    assert score(bench, request).logprobs == alone.logprobs
    assert isinstance(bench.events["long"][-1], Done)


def test_score_honours_steering_and_adapter(folder: Path) -> None:
    plain = score(Bench(folder), ScoreText("s", "abc", prompt="hello"))
    steer = (Steer("add", "calm", 2.0, scope="answer"),)
    steered = score(Bench(folder), ScoreText("s", "abc", prompt="hello", steer=steer))
    adapted = score(Bench(folder), ScoreText("s", "abc", prompt="hello", adapter="loud"))
    # The first token follows the prompt, which is not steered.
    assert steered.logprobs[0] == plain.logprobs[0]
    assert steered.logprobs[1:] != plain.logprobs[1:]
    assert adapted.logprobs[0] != plain.logprobs[0]


def test_score_of_a_known_prompt_adopts_it(folder: Path) -> None:
    bench = Bench(folder)
    first = score(bench, ScoreText("one", "abc", prompt="p" * 100, tenant="t"))
    assert isinstance(bench.model, ReferenceModel)
    n_steps = len(bench.model.steps)
    second = score(bench, ScoreText("two", "abc", prompt="p" * 100, tenant="t"))
    assert sum(len(step.tokens) for step in bench.model.steps[n_steps:]) == 3
    assert first.logprobs == second.logprobs


@pytest.mark.parametrize(("prompt", "continuation"), [("", ""), ("", "a"), ("hello", "")])
def test_score_of_nothing_is_refused(folder: Path, prompt: str, continuation: str) -> None:
    bench = Bench(folder)
    bench.submit(ScoreText("s", continuation, prompt=prompt))
    assert bench.failure("s").code == "invalid_request"


def test_score_beyond_the_context_is_refused(folder: Path) -> None:
    bench = Bench(folder, max_context=64)
    bench.submit(ScoreText("s", "a" * 60, prompt="hello"))
    assert bench.failure("s").code == "context_length_exceeded"


def test_embedding_is_the_mean_of_the_normed_residual(
    folder: Path, kind: str, transformers_model: LlamaForCausalLM
) -> None:
    texts = ("hello", "z" * 150, "hello")

    def vectors(chunk: int) -> list[np.ndarray]:
        bench = Bench(folder, kind, chunk=chunk)
        bench.submit(Embed("e", texts))
        bench.run()
        (event,) = bench.events["e"]
        assert isinstance(event, Embedded)
        assert event.usage.prompt == 160
        assert bench.n_used == 0
        return [np.array(vector) for vector in event.vectors]

    tokens = Bench(folder).tokenizer.encode_text("hello")
    with torch.inference_mode():
        hidden = transformers_model.model(torch.tensor([tokens])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
    for a, b in zip(vectors(16), vectors(512), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.linalg.norm(a) == pytest.approx(1.0, abs=1e-5)
    first, second, third = vectors(64)
    np.testing.assert_allclose(first, expected, atol=1e-4)
    np.testing.assert_allclose(first, third, atol=1e-6)
    assert not np.allclose(first, second, atol=0.01)


def test_reading_covers_every_prompt_token_once_whatever_the_chunks(
    folder: Path, kind: str
) -> None:
    whole, chunked = Bench(folder, kind, chunk=512), Bench(folder, kind, chunk=16)
    for bench in (whole, chunked):
        bench.submit(ask("r", "y" * 100, max_tokens=2))
        bench.submit(Scan("s", (Message(Role.USER, "y" * 100),)))
        bench.run()
    np.testing.assert_allclose(whole.logits("r"), chunked.logits("r"), atol=1e-4)
    np.testing.assert_allclose(whole.logits("r"), whole.logits("s"), atol=1e-4)
    n_prompt = len(whole.tokenizer.chat([Message(Role.USER, "y" * 100)]).tokens)
    reading = whole.reading("s")
    assert (reading.n_tokens, reading.probes) == (n_prompt, ("a", "b"))
    assert reading.segments[-1].end == n_prompt


def test_scans_alone_stop_after_the_last_layer_that_is_read(folder: Path) -> None:
    bench = Bench(folder)
    object.__setattr__(bench.probes, "last_layer", 1)
    object.__setattr__(bench.probes, "layers", (0, 1))
    bench.submit(Scan("s", (Message(Role.USER, "hello"),)))
    bench.run()
    assert isinstance(bench.model, ReferenceModel)
    assert {step.last_layer for step in bench.model.steps} == {1}
    bench.submit(Scan("t", (Message(Role.USER, "hello"),)))
    bench.submit(ask("r", "hello", max_tokens=1))
    bench.run()
    assert bench.model.steps[-1].last_layer is None
    np.testing.assert_array_equal(bench.logits("s"), bench.logits("t"))
