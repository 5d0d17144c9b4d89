"""What a request gets does not depend on its neighbours, its chunks or the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_model
from fortpoint.engine import precision
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.kv_cache import KVBudget
from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Span
from fortpoint.engine.protocol import (
    Done,
    Embed,
    Embedded,
    Event,
    Failed,
    Finished,
    Generate,
    Prefilled,
    Sampling,
    Scan,
    Scanned,
    Token,
)
from fortpoint.engine.runner import Runner
from fortpoint.engine.scheduler import Scheduler
from fortpoint.engine.sequence import Job
from fortpoint.types import Message, Role


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # the matrices are so small that a second thread only waits
    return tiny_model.make(tmp_path_factory.mktemp("runner") / "tiny")


class Bench:
    """A runner stepped by hand, on one thread."""

    def __init__(
        self, folder: Path, *, budget: int = 4096, max_batch: int = 8, chunk: int = 64
    ) -> None:
        model = Llama.load(folder, precision.plain("float32"), 512)
        self.tokenizer = ChatTokenizer.load(folder)
        source = torch.Generator().manual_seed(3)
        W = torch.randn(2, 2, model.config.hidden_size, generator=source)
        self.probes = LinearProbes(("a", "b"), (0, 2), W, torch.tensor([0.5, -0.5]))
        self.budget = KVBudget(budget)
        self.scheduler = Scheduler(max_batch, chunk, max_queue=16)
        self.runner = Runner(model, self.tokenizer, self.probes, self.scheduler, self.budget)
        self.events: dict[str, list[Event]] = {}

    def submit(self, request: Generate | Scan | Embed) -> Job:
        match request:
            case Embed():
                prompts = tuple(self.tokenizer.text(text) for text in request.texts)
            case Generate(prompt=str(text)):
                prompts = (self.tokenizer.text(text),)
            case _:
                prompts = (self.tokenizer.chat(request.messages or ()),)
        job = Job(request, prompts, self.events.setdefault(request.id, []).append)
        self.runner.submit(job)
        return job

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            self.runner._obey(wait=False)
            if not self.runner.step():
                return
        raise AssertionError("the runner did not come to rest")

    def text(self, request_id: str, choice: int = 0) -> str:
        events = self.events[request_id]
        return "".join(e.text for e in events if isinstance(e, Token) and e.choice == choice)

    def reasons(self, request_id: str) -> list[str]:
        return [e.reason for e in self.events[request_id] if isinstance(e, Finished)]


def _ask(
    request_id: str,
    text: str,
    max_tokens: int = 12,
    temperature: float = 0.0,
    seed: int | None = None,
    n: int = 1,
    stop: tuple[str, ...] = (),
    hold: bool = False,
) -> Generate:
    sampling = Sampling(max_tokens, temperature, seed=seed, n=n, stop=stop)
    return Generate(request_id, sampling, messages=(Message(Role.USER, text),), hold=hold)


def _alone(folder: Path, request: Generate) -> str:
    bench = Bench(folder)
    bench.submit(request)
    bench.run()
    return bench.text(request.id)


def test_generate_ends_with_one_done_and_counts_its_tokens(folder: Path) -> None:
    bench = Bench(folder)
    bench.submit(_ask("r", "hello"))
    bench.run()
    first, *_, last = bench.events["r"]
    assert isinstance(first, Prefilled)
    assert isinstance(last, Done)
    assert last.usage.completion == 12
    assert last.usage.prompt == first.n_prompt_tokens
    assert bench.reasons("r") == ["length"]
    assert bench.budget.free == bench.budget.n_tokens


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.text(alphabet="abc ", min_size=1, max_size=120), min_size=2, max_size=6),
    chunk=st.sampled_from([16, 33, 64]),
    max_batch=st.integers(1, 6),
    budget=st.sampled_from([256, 384, 4096]),
)
def test_generate_in_any_company_gives_the_same_greedy_text(
    folder: Path, texts: list[str], chunk: int, max_batch: int, budget: int
) -> None:
    """Batching, chunking, and eviction when memory is short change nothing at temperature 0."""
    bench = Bench(folder, budget=budget, max_batch=max_batch, chunk=chunk)
    requests = [_ask(f"r{i}", text, max_tokens=100) for i, text in enumerate(texts)]
    for request in requests:
        bench.submit(request)
    bench.run()
    for request in requests:
        assert bench.text(request.id) == _alone(folder, request)


def test_generate_evicted_and_computed_again_gives_the_same_sampled_text(folder: Path) -> None:
    requests = [_ask(f"r{i}", "x" * 90, 150, temperature=1.0, seed=i) for i in range(3)]
    bench = Bench(folder, budget=512)
    for request in requests:
        bench.submit(request)
    bench.run()
    assert [bench.text(r.id) for r in requests] == [_alone(folder, r) for r in requests]
    assert bench.budget.free == bench.budget.n_tokens


def test_generate_sends_one_event_for_each_token_that_it_counts(folder: Path) -> None:
    """Also for tokens without text: parts of a character, of a stop string, the end."""
    bench = Bench(folder)
    bench.submit(_ask("r", "hello", max_tokens=200, temperature=2.0, seed=2, n=3))
    bench.run()
    tokens = [event for event in bench.events["r"] if isinstance(event, Token)]
    done = bench.events["r"][-1]
    assert isinstance(done, Done)
    assert len(tokens) == done.usage.completion
    assert any(not token.text for token in tokens)


def test_generate_held_computes_nothing_until_it_may_proceed(folder: Path) -> None:
    bench = Bench(folder)
    job = bench.submit(_ask("r", "hello", hold=True))
    bench.run()
    assert [type(e) for e in bench.events["r"]] == [Prefilled]
    bench.runner.proceed(job)
    bench.run()
    assert isinstance(bench.events["r"][-1], Done)


def test_generate_that_may_proceed_before_its_prefill_is_not_held(folder: Path) -> None:
    bench = Bench(folder)
    bench.runner.proceed(bench.submit(_ask("r", "hello", hold=True)))
    bench.run()
    assert isinstance(bench.events["r"][-1], Done)


def test_generate_n_answers_differ_and_repeat_with_their_seed(folder: Path) -> None:
    def answers() -> list[str]:
        bench = Bench(folder)
        bench.submit(_ask("r", "hello", temperature=1.0, seed=5, n=3))
        bench.run()
        return [bench.text("r", choice) for choice in range(3)]

    first = answers()
    assert first == answers()
    assert len(set(first)) == 3


def test_generate_more_answers_than_places_still_gives_them_all(folder: Path) -> None:
    bench = Bench(folder, max_batch=2, budget=256)
    bench.submit(_ask("r", "hello", temperature=1.0, seed=1, n=5))
    bench.run()
    assert len(bench.reasons("r")) == 5
    assert bench.budget.free == bench.budget.n_tokens


def test_generate_stop_string_ends_the_answer_before_it(folder: Path) -> None:
    whole = _alone(folder, _ask("r", "hello", max_tokens=30))
    stop = whole[3:5]
    bench = Bench(folder)
    bench.submit(_ask("r", "hello", max_tokens=30, stop=(stop,)))
    bench.run()
    assert bench.text("r") == whole.split(stop, maxsplit=1)[0]
    assert bench.reasons("r") == ["stop"]


def test_cancel_frees_place_and_memory_and_sends_nothing_more(folder: Path) -> None:
    bench = Bench(folder)
    job = bench.submit(_ask("r", "hello", max_tokens=400))
    for _ in range(5):
        bench.runner._obey(wait=False)
        bench.runner.step()
    n_events = len(bench.events["r"])
    bench.runner.cancel(job)
    bench.run()
    assert len(bench.events["r"]) == n_events
    assert bench.budget.free == bench.budget.n_tokens
    assert bench.runner.n_running == 0


def test_cancel_before_admission_is_never_admitted(folder: Path) -> None:
    bench = Bench(folder)
    job = bench.submit(_ask("r", "hello"))
    job.ended = True
    bench.run()
    assert bench.events["r"] == []


def test_submit_beyond_the_queue_fails_as_busy(folder: Path) -> None:
    bench = Bench(folder, max_batch=1)
    for i in range(18):
        bench.submit(_ask(f"r{i}", "hello", max_tokens=1))
    bench.runner._obey(wait=False)
    refused = [i for i in range(18) if bench.events[f"r{i}"]]
    assert refused == [17]
    failed = bench.events["r17"][0]
    assert isinstance(failed, Failed)
    assert failed.code == "engine_busy"


def test_forward_that_raises_fails_its_requests_and_spares_later_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(folder)
    bench.submit(_ask("bad", "hello"))
    with monkeypatch.context() as broken:

        def explode(*_args: object, **_more: object) -> None:
            raise RuntimeError("out of memory at 0xdeadbeef")

        broken.setattr(Llama, "forward", explode)
        bench.run()
    failed = bench.events["bad"][-1]
    assert isinstance(failed, Failed)
    assert "0xdeadbeef" not in failed.message
    bench.submit(_ask("good", "hello"))
    bench.run()
    assert isinstance(bench.events["good"][-1], Done)


def test_logits_that_are_not_finite_fail_that_request_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(folder)
    bench.submit(_ask("bad", "hello"))
    bench.submit(_ask("good", "hello there"))
    real = Llama.logits

    def poisoned(self: Llama, x: torch.Tensor) -> torch.Tensor:
        logits = real(self, x)
        if len(logits) == 2:
            logits[0, 0] = float("nan")
        return logits

    monkeypatch.setattr(Llama, "logits", poisoned)
    bench.run()
    assert isinstance(bench.events["bad"][-1], Failed)
    assert isinstance(bench.events["good"][-1], Done)


def _logits(bench: Bench, request_id: str) -> np.ndarray:
    (event,) = (e for e in bench.events[request_id] if isinstance(e, Prefilled | Scanned))
    assert event.reading is not None
    return np.frombuffer(event.reading.logits, "<f4").reshape(event.reading.n_tokens, 2)


def test_reading_covers_every_prompt_token_once_whatever_the_chunks(folder: Path) -> None:
    text = "y" * 100
    whole, chunked = Bench(folder, chunk=512), Bench(folder, chunk=16)
    for bench in (whole, chunked):
        bench.submit(_ask("r", text, max_tokens=2))
        bench.run()
    np.testing.assert_allclose(_logits(whole, "r"), _logits(chunked, "r"), atol=1e-4)


def test_reading_equals_the_probes_formula(folder: Path) -> None:
    bench = Bench(folder)
    bench.submit(Scan("s", (Message(Role.USER, "hello"),)))
    bench.run()
    model = Llama.load(folder, precision.plain("float32"), 512)
    tokens = bench.tokenizer.chat([Message(Role.USER, "hello")]).tokens
    cache = model.cache(KVBudget(512))
    assert cache.reserve(len(tokens))
    expected = torch.tensor([[0.5, -0.5]]).repeat(len(tokens), 1)

    def read(layer: int, x: torch.Tensor) -> None:
        if layer in (0, 2):
            rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            expected.add_((x / rms) @ bench.probes._weights[layer].T)

    with torch.inference_mode():
        model.forward(tokens, [Span(cache, 0, len(tokens))], read)
    np.testing.assert_allclose(_logits(bench, "s"), expected.numpy(), atol=1e-4)


def test_embed_gives_unit_vectors_in_order_whatever_the_chunks(folder: Path) -> None:
    texts = ("hello", "z" * 150, "hello")

    def vectors(chunk: int) -> Iterator[np.ndarray]:
        bench = Bench(folder, chunk=chunk)
        bench.submit(Embed("e", texts))
        bench.run()
        (event,) = bench.events["e"]
        assert isinstance(event, Embedded)
        assert event.usage.prompt == 160
        yield from (np.array(vector) for vector in event.vectors)

    for a, b in zip(vectors(16), vectors(512), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.linalg.norm(a) == pytest.approx(1.0, abs=1e-5)
    first, second, third = vectors(64)
    np.testing.assert_allclose(first, third, atol=1e-6)
    assert not np.allclose(first, second)
