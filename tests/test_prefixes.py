"""What was computed for a common beginning is computed once, and never for the wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_bench import MODELS, Bench, ask, logits_of, make_folder
from fortpoint.engine.protocol import Embed, Generate, Sampling, Scan, Steer, Watch
from fortpoint.types import Message, Role

SYSTEM = "s" * 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("prefixes"))


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Counting(Bench):
    """Counts the rows that the model computes."""

    n_rows = 0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        forward = self.model.forward

        def counted(step: Any) -> Any:
            self.n_rows += len(step.tokens)
            return forward(step)

        self.model.forward = counted  # type: ignore[method-assign]

    def rows_of(self, request: Any) -> int:
        before = self.n_rows
        self.submit(request)
        self.run()
        return self.n_rows - before


def test_prompt_that_is_known_is_not_computed_again(folder: Path, kind: str) -> None:
    bench = Counting(folder, kind)
    first = bench.rows_of(ask("a", SYSTEM, max_tokens=1))
    again = bench.rows_of(ask("b", SYSTEM, max_tokens=1))
    longer = bench.rows_of(ask("c", SYSTEM + "and more", max_tokens=1))
    assert again <= first - 96
    assert longer <= first + 8 - 96
    assert bench.text("a") == bench.text("b")


def test_prompts_that_come_together_compute_their_beginning_once(folder: Path, kind: str) -> None:
    bench = Counting(folder, kind)
    for i in range(6):
        bench.submit(ask(f"r{i}", SYSTEM + str(i), max_tokens=1, tenant="ab"[i % 2]))
    bench.run()
    n_prompt = len(bench.tokenizer.chat([Message(Role.USER, SYSTEM + "0")]).tokens)
    assert bench.n_rows <= 2 * n_prompt + 4 * (n_prompt - 96)
    for i in range(6):
        fresh = Bench(folder, kind)
        fresh.submit(ask("r", SYSTEM + str(i), max_tokens=1))
        fresh.run()
        assert bench.text(f"r{i}") == fresh.text("r")


def test_reading_is_complete_though_a_prefix_was_adopted(folder: Path, kind: str) -> None:
    bench, fresh = Counting(folder, kind), Bench(folder, kind)
    bench.rows_of(ask("a", SYSTEM))
    bench.rows_of(ask("b", SYSTEM + "and more"))
    fresh.submit(ask("b", SYSTEM + "and more"))
    fresh.run()
    np.testing.assert_array_equal(bench.logits("b"), fresh.logits("b"))
    assert bench.text("b") == fresh.text("b")
    assert bench.reading("b").segments == fresh.reading("b").segments


@pytest.mark.parametrize(
    ("first", "second", "shares"),
    [
        ({}, {}, True),
        ({"tenant": "x"}, {"tenant": "x"}, True),
        ({"tenant": "x"}, {"tenant": "y"}, False),
        ({"tenant": "x"}, {}, False),
        ({"adapter": "loud"}, {}, False),
        ({}, {"adapter": "loud"}, False),
        ({"adapter": "loud"}, {"adapter": "loud"}, True),
        ({"steer": (Steer("add", "calm", 1.0),)}, {}, False),
        ({}, {"steer": (Steer("add", "calm", 1.0),)}, False),
        ({"steer": (Steer("add", "calm", 1.0),)},) * 2 + (False,),
        ({}, {"steer": (Steer("add", "calm", 1.0, scope="answer"),)}, True),
        ({"steer": (Steer("add", "calm", 1.0, scope="answer"),)}, {}, True),
        ({}, {"watch": Watch(("sae",))}, False),
        ({"watch": Watch(("sae",))}, {}, True),
    ],
)
def test_prefixes_are_shared_only_where_they_are_the_same(
    folder: Path, first: dict[str, Any], second: dict[str, Any], shares: bool
) -> None:
    bench = Counting(folder)
    bench.rows_of(ask("a", SYSTEM, max_tokens=4, **first))
    n_rows = bench.rows_of(ask("b", SYSTEM, max_tokens=4, **second))
    assert (n_rows < 100) == shares
    fresh = Bench(folder)
    fresh.submit(ask("b", SYSTEM, max_tokens=4, **second))
    fresh.run()
    assert bench.text("b") == fresh.text("b")
    np.testing.assert_array_equal(bench.logits("b"), fresh.logits("b"))


@pytest.mark.parametrize("salts", [("1:", "x"), ("", "1:x")])
def test_tenant_and_adapter_names_do_not_run_together(folder: Path, salts: tuple[str, str]) -> None:
    from fortpoint.engine.sequence import Job
    from reference_model import ReferenceAdapter

    def salt(tenant: str, adapter: str) -> str:
        made = Job(ask("r", "x", tenant=tenant))
        made.adapter = ReferenceAdapter(adapter, 1.0)
        return made.salt

    assert salt("ab", "c") != salt("a", "bc")
    assert salt(*salts) != salt("".join(salts), "")


def test_scans_and_embeddings_publish_nothing(folder: Path) -> None:
    bench = Counting(folder)
    bench.rows_of(Scan("s", (Message(Role.USER, SYSTEM),)))
    bench.rows_of(Embed("e", (SYSTEM,)))
    assert bench.rows_of(ask("r", SYSTEM, max_tokens=1)) > 120


def test_next_turn_of_a_conversation_adopts_the_answer(folder: Path, kind: str) -> None:
    bench = Counting(folder, kind)
    # JSON, so that the answer's text becomes its tokens again.
    schema = '{"type": "string", "pattern": "^[a-z]{40}$"}'
    bench.rows_of(ask("a", "hello", max_tokens=100, json_schema=schema))
    turns = (
        Message(Role.USER, "hello"),
        Message(Role.ASSISTANT, bench.text("a")),
        Message(Role.USER, "go on"),
    )
    follow = Generate("b", Sampling(5, 0.0), messages=turns, hold=False)
    n_prompt = len(bench.tokenizer.chat(turns).tokens)
    n_first = len(bench.tokenizer.chat(turns[:1]).tokens)
    assert n_prompt - bench.rows_of(follow) >= (n_first + 30) // 32 * 32 - 5
    fresh = Bench(folder, kind)
    fresh.submit(follow)
    fresh.run()
    assert bench.text("b") == fresh.text("b")
    np.testing.assert_array_equal(bench.logits("b"), fresh.logits("b"))


def test_steered_answer_is_not_published(folder: Path) -> None:
    bench = Counting(folder)
    schema = '{"type": "string", "pattern": "^[a-z]{40}$"}'
    steer = (Steer("add", "calm", 1.0, scope="answer"),)
    bench.rows_of(ask("a", "hello", max_tokens=100, json_schema=schema, steer=steer))
    turns = (
        Message(Role.USER, "hello"),
        Message(Role.ASSISTANT, bench.text("a")),
        Message(Role.USER, "go on"),
    )
    follow = Generate("b", Sampling(5, 0.0), messages=turns, hold=False)
    bench.rows_of(follow)
    fresh = Bench(folder)
    fresh.submit(follow)
    fresh.run()
    np.testing.assert_array_equal(bench.logits("b"), fresh.logits("b"))


def test_evicted_answer_comes_back_by_its_own_prefix(folder: Path) -> None:
    bench = Counting(folder, n_tokens=384, max_context=384)
    for i in range(2):
        bench.submit(ask(f"r{i}", f"{i}" + "x" * 100, max_tokens=120, tenant=str(i)))
    bench.run()
    for i in range(2):
        fresh = Bench(folder)
        fresh.submit(ask(f"r{i}", f"{i}" + "x" * 100, max_tokens=120))
        fresh.run()
        assert bench.text(f"r{i}") == fresh.text(f"r{i}")
        readings = zip(bench.tokens(f"r{i}"), fresh.tokens(f"r{i}"), strict=True)
        for got, expected in readings:
            assert got.reading is not None
            assert expected.reading is not None
            np.testing.assert_array_equal(logits_of(got.reading), logits_of(expected.reading))
