"""The engine reads what is watched at every token, however it came to be computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine_bench
from engine_bench import MODELS, Bench, ask, make_folder
from fortpoint.engine.protocol import Scan, Scanned, Steer
from fortpoint.engine.taps import Taps
from fortpoint.engine.target_reader import TargetReader
from fortpoint.types import Message, Reading, Role

NAMES = ("calm", "sae/3", "sae/9")
LONG = "s" * 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("watched"))


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def taps(library: Any, probes: Any) -> Taps:
        return Taps(library, probes, TargetReader.load(NAMES, library))

    monkeypatch.setattr(engine_bench, "Taps", taps)


def values(reading: Reading | None) -> np.ndarray:
    assert reading is not None
    return np.frombuffer(reading.target_values, "<f4").reshape(reading.n_tokens, len(NAMES))


def prompt_of(bench: Bench, request: Any) -> np.ndarray:
    bench.submit(request)
    bench.run()
    reading = bench.reading(request.id)
    assert reading.targets == NAMES
    assert len(reading.logits) == reading.n_tokens * 2 * 4
    return values(reading)


def test_prompt_reads_the_same_in_chunks_and_with_an_adopted_beginning(
    folder: Path, kind: str
) -> None:
    whole = prompt_of(Bench(folder, kind, chunk=512), ask("r", LONG + "more"))
    assert (whole > 0).any()
    assert (prompt_of(Bench(folder, kind, chunk=16), ask("r", LONG + "more")) == whole).all()
    shared = Bench(folder, kind)
    prompt_of(shared, ask("first", LONG))
    assert (prompt_of(shared, ask("r", LONG + "more")) == whole).all()


def test_scan_reads_what_a_prompt_reads(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind)
    bench.submit(Scan("s", (Message(Role.USER, LONG),)))
    bench.run()
    (scanned,) = bench.events["s"]
    assert isinstance(scanned, Scanned)
    assert (values(scanned.reading) == prompt_of(bench, ask("r", LONG))).all()


def test_answer_tokens_read_what_the_whole_text_reads_there(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind)
    prompt = prompt_of(bench, ask("r", "hello", max_tokens=8))
    read = np.concatenate([values(token.reading) for token in bench.tokens("r")])
    assert len(read) == 8
    assert (read[0] == prompt[-1]).all()  # chosen at the prompt's last token
    assert len({row.tobytes() for row in read}) > 1
    assert all(token.reading.targets == () for token in bench.tokens("r") if token.reading)


def test_every_answer_of_several_is_read(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind)
    prompt_of(bench, ask("r", "hello", max_tokens=6, temperature=1.0, n=3, seed=1))
    for choice in range(3):
        assert len([values(t.reading) for t in bench.tokens("r", choice)]) == 6


def test_answer_computed_again_after_eviction_reads_the_same(folder: Path, kind: str) -> None:
    roomy, tight = Bench(folder, kind), Bench(folder, kind, n_tokens=512)
    requests = [ask(f"r{i}", "x" * 90, 150, temperature=1.0, seed=i) for i in range(3)]
    for bench in (roomy, tight):
        for request in requests:
            bench.submit(request)
        bench.run()
    for request in requests:
        first, again = (
            [values(token.reading).tobytes() for token in bench.tokens(request.id)]
            for bench in (roomy, tight)
        )
        assert first == again


def test_steered_answer_reads_the_stream_as_it_was_computed(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind)
    steered = ask("r", "hello", steer=(Steer("add", "calm", 9.0, scope="answer"),))
    prompt = prompt_of(bench, steered)
    read = np.concatenate([values(token.reading) for token in bench.tokens("r")])
    assert (read[1:, 0] > prompt[:, 0].max()).all()
    assert (read[1:, 0] > 6).all()


def test_request_that_reads_nothing_sends_nothing(folder: Path) -> None:
    bench = Bench(folder)
    bench.submit(ask("r", "hello", read=False))
    bench.run()
    assert all(token.reading is None for token in bench.tokens("r"))
