"""One of several answers can be stopped alone: its place is freed, the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_bench import MODELS, Bench, ask, make_folder
from fortpoint.engine.protocol import Done, Finished, Token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("drop"))


@pytest.mark.parametrize("kind", MODELS)
def test_dropped_answer_ends_and_the_others_stay_what_they_were(folder: Path, kind: str) -> None:
    whole = Bench(folder, kind)
    whole.submit(ask("r", "hello", temperature=1.0, seed=5, n=3, max_tokens=12))
    whole.run()
    bench = Bench(folder, kind)
    job = bench.submit(ask("r", "hello", temperature=1.0, seed=5, n=3, max_tokens=12))
    bench.step(4)
    before = len([e for e in bench.events["r"] if isinstance(e, Token) and e.choice == 1])
    bench.runner.drop(job, 1)
    bench.run()

    reasons = {e.choice: e.reason for e in bench.events["r"] if isinstance(e, Finished)}
    assert reasons[1] == "cancelled"
    assert {reasons[0], reasons[2]} <= {"stop", "length"}
    assert [bench.text("r", choice) for choice in (0, 2)] == [
        whole.text("r", choice) for choice in (0, 2)
    ]
    after = len([e for e in bench.events["r"] if isinstance(e, Token) and e.choice == 1])
    assert after == before
    assert isinstance(bench.events["r"][-1], Done)
    assert bench.runner.n_running == bench.runner.n_waiting == 0


def test_dropping_what_is_not_there_changes_nothing(folder: Path) -> None:
    bench = Bench(folder, MODELS[0])
    job = bench.submit(ask("r", "hello", max_tokens=4, n=2))
    bench.runner.drop(job, 7)
    bench.run()
    bench.runner.drop(job, 0)
    bench.run()

    assert isinstance(bench.events["r"][-1], Done)
    assert len([e for e in bench.events["r"] if isinstance(e, Finished)]) == 2
