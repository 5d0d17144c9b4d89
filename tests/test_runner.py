"""What a request gets does not depend on its neighbours, its chunks or the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_bench import MODELS, Bench, ask, make_folder
from fortpoint.engine.protocol import Condition, Done, Generate, Prefilled, Steer, Token

WAYS: tuple[tuple[Steer, ...], ...] = (
    (),
    (Steer("add", "calm", 1.5),),
    (Steer("add", "sae/3", 2.0, scope="answer"),),
    (Steer("ablate", "calm"), Steer("clamp", "sae/7", 1.0, when=Condition("sae/2", 0.1))),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("runner"))


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def alone(folder: Path, kind: str, request: Generate) -> list[str]:
    bench = Bench(folder, kind)
    bench.submit(request)
    bench.run()
    return [bench.text(request.id, choice) for choice in range(request.sampling.n)]


_request = st.builds(
    lambda text, way, temperature, n, most, tenant: {
        "text": text,
        "steer": WAYS[way],
        "temperature": temperature,
        "n": n,
        "max_tokens": most,
        "tenant": tenant,
        "stop": ("q",),
        "repetition_penalty": 1.2 if n == 2 else 1.0,
    },
    text=st.text(alphabet="abc ", min_size=1, max_size=90),
    way=st.integers(0, len(WAYS) - 1),
    temperature=st.sampled_from([0.0, 0.8]),
    n=st.sampled_from([1, 1, 2]),
    most=st.integers(1, 60),
    tenant=st.sampled_from(["", "x"]),
)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    asked=st.lists(_request, min_size=2, max_size=5),
    chunk=st.sampled_from([16, 33, 64]),
    max_batch=st.integers(2, 6),
    n_tokens=st.sampled_from([192, 256, 4096]),
    pauses=st.lists(st.integers(0, 9), min_size=5, max_size=5),
)
def test_request_in_any_company_gets_the_same_tokens(
    folder: Path,
    kind: str,
    asked: list[dict[str, object]],
    chunk: int,
    max_batch: int,
    n_tokens: int,
    pauses: list[int],
) -> None:
    """Batching, joining and leaving, chunks, shared prefixes, neighbours' steering, eviction."""
    bench = Bench(
        folder, kind, n_tokens=n_tokens, max_batch=max_batch, chunk=chunk, max_context=192
    )
    requests = [ask(f"r{i}", seed=i, **wish) for i, wish in enumerate(asked)]  # type: ignore[arg-type]
    for request, pause in zip(requests, pauses, strict=False):
        bench.submit(request)
        bench.step(pause)
    bench.run()
    for request in requests:
        got = [bench.text(request.id, choice) for choice in range(request.sampling.n)]
        assert got == alone(folder, kind, request)
    assert bench.n_used == 0


def test_evicted_and_computed_again_gives_the_same_sampled_text(folder: Path, kind: str) -> None:
    requests = [ask(f"r{i}", "x" * 90, 150, temperature=1.0, seed=i) for i in range(3)]
    bench = Bench(folder, kind, n_tokens=512)
    for request in requests:
        bench.submit(request)
    bench.run()
    assert [[bench.text(r.id)] for r in requests] == [alone(folder, kind, r) for r in requests]
    assert bench.n_used == 0


def test_youngest_gives_way_when_memory_runs_out(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind, n_tokens=384, max_context=384)
    for i in range(3):
        bench.submit(ask(f"r{i}", "x" * 60, 200))
    bench.run()
    ends = [
        (job.request.id)
        for batch in bench.batches
        for job, event in batch
        if isinstance(event, Done)
    ]
    assert ends[0] == "r0"
    assert sorted(ends) == ["r0", "r1", "r2"]


def test_generate_ends_with_one_done_and_counts_its_tokens(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind)
    bench.submit(ask("r", "hello"))
    bench.run()
    first, *_, last = bench.events["r"]
    assert isinstance(first, Prefilled)
    assert isinstance(last, Done)
    assert last.usage.completion == 12
    assert last.usage.prompt == first.n_prompt_tokens
    assert bench.reasons("r") == ["length"]
    assert bench.n_used == 0


def test_events_of_a_step_are_delivered_together(folder: Path) -> None:
    bench = Bench(folder, chunk=512)
    for i in range(4):
        bench.submit(ask(f"r{i}", "hello", max_tokens=5))
    bench.step()
    bench.batches.clear()
    bench.step()
    (batch,) = bench.batches
    assert [type(event) for _, event in batch] == [Token] * 4


def test_generate_held_computes_nothing_until_it_may_proceed(folder: Path) -> None:
    bench = Bench(folder)
    job = bench.submit(ask("r", "hello", hold=True))
    bench.run()
    assert [type(e) for e in bench.events["r"]] == [Prefilled]
    bench.runner.proceed(job)
    bench.run()
    assert isinstance(bench.events["r"][-1], Done)


def test_generate_that_may_proceed_before_its_prefill_is_not_held(folder: Path) -> None:
    bench = Bench(folder)
    bench.runner.proceed(bench.submit(ask("r", "hello", hold=True)))
    bench.run()
    assert isinstance(bench.events["r"][-1], Done)


def test_first_token_leaves_as_soon_as_it_may(folder: Path) -> None:
    bench = Bench(folder)
    job = bench.submit(ask("r", "hello", hold=True))
    bench.run()
    bench.runner.proceed(job)
    bench.runner.obey(wait=False)
    assert isinstance(bench.events["r"][-1], Token)


def test_parked_keeps_its_place_when_memory_runs_out(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind, n_tokens=256, max_context=256)
    held = bench.submit(ask("held", "x" * 60, 20, hold=True))
    bench.submit(ask("long", "y" * 20, 120))
    bench.run()
    assert [type(e) for e in bench.events["held"]] == [Prefilled]
    bench.runner.proceed(held)
    bench.run()
    assert [bench.text("held")] == alone(folder, kind, ask("held", "x" * 60, 20))


def test_cancel_frees_place_and_memory_and_sends_nothing_more(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind, max_batch=1)
    job = bench.submit(ask("r", "hello", max_tokens=400))
    bench.submit(ask("next", "hello", max_tokens=3))
    bench.step(5)
    n_events = len(bench.events["r"])
    bench.runner.cancel(job)
    bench.step()  # its place is the next one's in the very next step
    assert isinstance(bench.events["next"][0], Prefilled)
    bench.run()
    assert len(bench.events["r"]) == n_events
    assert bench.n_used == 0
    assert bench.runner.n_running == 0


def test_cancel_of_a_waiting_request_leaves_the_queue(folder: Path) -> None:
    bench = Bench(folder, max_batch=1)
    bench.submit(ask("r", "hello", max_tokens=30))
    waiting = bench.submit(ask("waiting", "hello"))
    bench.step(2)
    assert bench.runner.n_waiting == 1
    bench.runner.cancel(waiting)
    bench.runner.obey(wait=False)
    assert bench.runner.n_waiting == 0
    bench.run()
    assert bench.events["waiting"] == []


def test_cancel_before_admission_is_never_admitted(folder: Path) -> None:
    bench = Bench(folder)
    job = bench.submit(ask("r", "hello"))
    job.ended = True
    bench.run()
    assert bench.events["r"] == []


def test_submit_beyond_the_queue_fails_as_busy(folder: Path) -> None:
    bench = Bench(folder, max_batch=1, max_queue=16)
    for i in range(18):
        bench.submit(ask(f"r{i}", "hello", max_tokens=1))
    bench.runner.obey(wait=False)
    assert [i for i in range(18) if bench.events[f"r{i}"]] == [17]
    assert bench.failure("r17").code == "engine_busy"


def test_more_answers_than_could_ever_run_are_refused(folder: Path) -> None:
    bench = Bench(folder, max_batch=2)
    bench.submit(ask("r", "hello", n=3))
    bench.run()
    assert bench.failure("r").code == "invalid_request"
    assert "at most 2" in bench.failure("r").message


def test_answers_without_a_free_place_wait_for_one(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind, max_batch=3)
    bench.submit(ask("long", "hello", max_tokens=30))
    bench.submit(ask("r", "hello", temperature=1.0, seed=1, n=3))
    bench.run()
    assert len(bench.reasons("r")) == 3
    together = [bench.text("r", choice) for choice in range(3)]
    assert together == alone(folder, kind, ask("r", "hello", temperature=1.0, seed=1, n=3))
    assert bench.n_used == 0


def test_answer_at_the_contexts_end_is_cut_off(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind, max_context=64, n_tokens=64)
    bench.submit(ask("r", "hello", max_tokens=1000))
    bench.run()
    done = bench.events["r"][-1]
    assert isinstance(done, Done)
    assert done.usage.prompt + done.usage.completion == 64
    assert bench.reasons("r") == ["length"]


def test_prompt_beyond_the_context_is_refused(folder: Path) -> None:
    bench = Bench(folder, max_context=64)
    bench.submit(ask("r", "x" * 64))
    assert bench.failure("r").code == "context_length_exceeded"


def test_adapter_changes_its_own_request_alone(folder: Path) -> None:
    bench = Bench(folder)
    bench.submit(ask("plain", "hello"))
    bench.submit(ask("loud", "hello", adapter="loud"))
    bench.run()
    assert [bench.text("plain")] == alone(folder, "reference", ask("plain", "hello"))
    assert [bench.text("loud")] == alone(folder, "reference", ask("x", "hello", adapter="loud"))
    assert bench.text("plain") != bench.text("loud")


@pytest.mark.parametrize(
    "wish",
    [
        {"adapter": "absent"},
        {"steer": (Steer("add", "absent", 1.0),)},
        {"steer": (Steer("add", "sae/64", 1.0),)},
        {"steer": (Steer("add", "calm", float("nan")),)},
        {"steer": (Steer("add", "calm", 1e9),)},
        {"stop_when": (Condition("absent/0", 0.5),)},
        {"json_schema": "{"},
    ],
)
def test_request_for_what_is_not_here_is_refused(folder: Path, wish: dict[str, object]) -> None:
    bench = Bench(folder)
    bench.submit(ask("r", "hello", **wish))  # type: ignore[arg-type]
    bench.run()
    assert bench.failure("r").code == "invalid_request"
