"""Places, rows and memory are shared fairly between tenants, and nobody waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_bench import Bench, ask, make_folder
from fortpoint.engine.protocol import Done, Embed, Prefilled, ScoreText, Token
from reference_model import ReferenceModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("scheduler"))


def order(bench: Bench, kind: type) -> list[str]:
    """The requests by their first event of this kind."""
    events = (sent for batch in bench.batches for sent in batch)
    return list(dict.fromkeys(job.request.id for job, event in events if isinstance(event, kind)))


def rows_of_last_step(bench: Bench) -> list[int]:
    assert isinstance(bench.model, ReferenceModel)
    return [span.end - span.start for span in bench.model.steps[-1].spans]


def test_tenant_with_a_long_queue_does_not_keep_another_waiting(folder: Path) -> None:
    bench = Bench(folder, max_batch=1)
    for i in range(6):
        bench.submit(ask(f"a{i}", "hello", max_tokens=4, tenant="a"))
    for i in range(2):
        bench.submit(ask(f"b{i}", "hello", max_tokens=4, tenant="b"))
    bench.run()
    assert order(bench, Done) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_places_that_become_free_go_to_who_had_least(folder: Path) -> None:
    bench = Bench(folder, max_batch=4, chunk=512)
    for i in range(8):
        bench.submit(ask(f"a{i}", "hello", max_tokens=10, tenant="a"))
    bench.step(3)
    for i in range(3):
        bench.submit(ask(f"b{i}", "hello", max_tokens=10, tenant="b"))
    bench.run()
    assert [name[0] for name in order(bench, Prefilled)][4:8].count("b") == 2  # then they are even
    assert len(order(bench, Done)) == 11


def test_long_requests_buy_no_more_than_short_ones(folder: Path) -> None:
    """With one place, a tenant of long answers waits while the other's short ones add up."""
    bench = Bench(folder, max_batch=1)
    for i in range(3):
        bench.submit(ask(f"long{i}", "hello", max_tokens=40, tenant="a"))
    for i in range(6):
        bench.submit(ask(f"short{i}", "hello", max_tokens=4, tenant="b"))
    bench.run()
    done = order(bench, Done)
    assert done.index("short2") < done.index("long1")


def test_tenant_that_was_away_has_no_credit(folder: Path) -> None:
    bench = Bench(folder, max_batch=1)
    for i in range(3):
        bench.submit(ask(f"a{i}", "hello", max_tokens=40, tenant="a"))
    bench.step(60)
    for i in range(3):
        bench.submit(ask(f"b{i}", "hello", max_tokens=40, tenant="b"))
    bench.run()
    done = order(bench, Done)
    assert done.index("a2") < done.index("b2")


def test_rows_of_a_step_are_shared_between_tenants_prompts(folder: Path) -> None:
    bench = Bench(folder, chunk=64)
    bench.submit(ask("a0", "x" * 300, tenant="a"))
    bench.submit(ask("a1", "x" * 300, tenant="a"))
    bench.step()
    bench.submit(ask("b0", "y" * 300, tenant="b"))
    bench.step()
    assert rows_of_last_step(bench) == [32, 32]
    bench.submit(ask("c0", "y", max_tokens=2, tenant="c"))
    bench.step()
    assert sorted(rows_of_last_step(bench)) == [20, 22, 22]  # it needs no more than 20


def test_rows_that_a_tenant_cannot_use_go_to_the_others(folder: Path) -> None:
    bench = Bench(folder, chunk=100)
    bench.submit(ask("a", "x" * 300, tenant="a"))
    bench.submit(ask("b", "", max_tokens=1, tenant="b"))
    bench.step()
    n_b = len(bench.tokenizer.chat(ask("b", "").messages or ()).tokens)
    assert sorted(rows_of_last_step(bench)) == sorted([n_b, 100 - n_b])


def test_older_prompt_of_a_tenant_is_read_first(folder: Path) -> None:
    bench = Bench(folder, chunk=32)
    for i in range(3):
        bench.submit(ask(f"r{i}", "x" * 80, max_tokens=1))
    bench.run()
    assert order(bench, Prefilled) == ["r0", "r1", "r2"]


def test_long_prompt_never_stalls_tokens_for_more_than_a_chunk(folder: Path) -> None:
    bench = Bench(folder, chunk=16)
    bench.submit(ask("talks", "hello", max_tokens=60))
    bench.step(4)
    bench.submit(ask("long", "x" * 400, max_tokens=1))
    for _ in range(20):
        n_before = len(bench.tokens("talks"))
        bench.step()
        assert len(bench.tokens("talks")) == n_before + 1
        assert sum(rows_of_last_step(bench)) <= 17


def test_prompt_that_needs_all_memory_waits_and_is_served(folder: Path) -> None:
    bench = Bench(folder, n_tokens=256, max_context=256)
    bench.submit(ask("talks", "hello", max_tokens=100))
    bench.step(3)
    bench.submit(ask("big", "x" * 180, max_tokens=30))
    bench.submit(ask("small", "y", max_tokens=5, tenant="b"))
    bench.run()
    assert all(isinstance(bench.events[r][-1], Done) for r in ("talks", "big", "small"))
    assert bench.n_used == 0


def test_request_that_memory_can_never_hold_fails_and_spares_others(folder: Path) -> None:
    bench = Bench(folder, n_tokens=64, max_context=512)
    bench.model.max_context = 512
    bench.intake._max_context = 512
    bench.submit(ask("big", "x" * 200))
    bench.submit(ask("small", "y", max_tokens=5))
    bench.run()
    assert bench.failure("big").code == "engine_error"
    assert isinstance(bench.events["small"][-1], Done)


def test_scored_rows_of_a_step_are_limited(folder: Path) -> None:
    bench = Bench(folder, chunk=256)
    for i in range(3):
        bench.submit(ScoreText(f"s{i}", "z" * 100, prompt="hello"))
    bench.submit(ask("talks", "hello", max_tokens=20))
    bench.run()
    assert isinstance(bench.model, ReferenceModel)
    assert max(len(step.logit_rows) for step in bench.model.steps) <= 32 + 1
    assert len(bench.tokens("talks")) == 20


def test_queue_counts_what_waits_and_empties(folder: Path) -> None:
    bench = Bench(folder, max_batch=2, max_queue=4, chunk=100)
    bench.submit(Embed("e", tuple(letter * 60 for letter in "abcd")))
    bench.submit(ask("r", "hello", max_tokens=3))
    bench.step()
    assert bench.runner.n_running == 1
    assert bench.runner.n_waiting == 3
    bench.run()
    assert bench.runner.n_waiting == bench.runner.n_running == 0
    assert len([e for e in bench.events["r"] if isinstance(e, Token)]) == 3


def test_tenant_that_fills_the_queue_makes_room_for_another(folder: Path) -> None:
    bench = Bench(folder, max_batch=1, max_queue=4)
    for i in range(5):
        bench.submit(ask(f"a{i}", "hello", max_tokens=2, tenant="a"))
    for i in range(3):
        bench.submit(ask(f"b{i}", "hello", max_tokens=2, tenant="b"))
    bench.submit(ask("a5", "hello", max_tokens=2, tenant="a"))
    bench.run()
    failed = {name for name in bench.events if not isinstance(bench.events[name][-1], Done)}
    assert failed == {"a4", "a3", "b2", "a5"}
    assert {bench.failure(name).code for name in failed} == {"engine_busy"}
