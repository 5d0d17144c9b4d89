"""What breaks ends its own request, with its own error, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_bench import MODELS, Bench, ask, make_folder
from fortpoint.engine.model import Result, Step
from fortpoint.engine.protocol import Done, Embed, Scan, Scanned, ScoreText, Steer
from fortpoint.types import Message, Role


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("faults"))


def _poison(bench: Bench, monkeypatch: pytest.MonkeyPatch, token: int, where: str) -> None:
    """Whatever row has ``token`` comes out of the model as NaN."""
    forward = bench.model.forward

    def poisoned(step: Step) -> Result:
        result = forward(step)
        rows = [row for row, at in enumerate(step.tokens) if at == token]
        if where == "residual":
            result.residual[rows] = np.nan
        for layer in result.seen:
            result.seen[layer][rows] = np.nan
        for i, row in enumerate(step.logit_rows):
            if row in rows and where == "logits":
                result.logits[i, 7] = np.nan
        return result

    monkeypatch.setattr(bench.model, "forward", poisoned)


def _token(bench: Bench, text: str) -> int:
    (token,) = bench.tokenizer.encode_text(text)
    return token


def test_step_that_raises_fails_the_guilty_request_alone(folder: Path, capfd: Any) -> None:
    bench = Bench(folder, chunk=512)
    bench.model.raises_at = _token(bench, "Q")
    requests = [ask("good", "hello"), ask("bad", "Quit"), ask("fine", "what")]
    bench.submit(requests[0])
    bench.step(3)
    for request in requests[1:]:
        bench.submit(request)
    bench.submit(Scan("scan", (Message(Role.USER, "scan"),)))
    bench.run()
    assert bench.failure("bad").code == "engine_error"
    assert "0xdeadbeef" not in bench.failure("bad").message
    assert "0xdeadbeef" not in capfd.readouterr().err
    for name in ("good", "fine"):
        assert isinstance(bench.events[name][-1], Done)
    assert isinstance(bench.events["scan"][-1], Scanned)
    undisturbed = Bench(folder)
    undisturbed.submit(requests[0])
    undisturbed.run()
    assert bench.text("good") == undisturbed.text("good")
    assert bench.n_used == 0


def test_step_that_raises_midway_in_an_answer_fails_it_alone(folder: Path) -> None:
    whole = Bench(folder)
    whole.submit(ask("r", "hello", max_tokens=20))
    whole.run()
    bench = Bench(folder)
    bench.submit(ask("r", "hello", max_tokens=20))
    bench.submit(ask("other", "a", max_tokens=20, steer=(Steer("add", "calm", 2.0),)))
    bench.step(6)
    (sequence,) = (s for s in bench.scheduler.running if s.job.request.id == "r")
    bench.model.raises_at = sequence.tokens[-1]
    bench.step()
    bench.model.raises_at = None
    bench.run()
    assert bench.failure("r").code == "engine_error"
    assert isinstance(bench.events["other"][-1], Done)
    assert whole.text("r").startswith(bench.text("r"))


def test_cache_that_moved_in_a_failed_step_is_not_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(folder)
    bench.submit(ask("a", "hello"))
    bench.submit(ask("b", "hello"))

    def moves(step: Step) -> Result:
        for span in step.spans:
            span.cache.length += 1  # type: ignore[attr-defined]
        raise ValueError

    monkeypatch.setattr(bench.model, "forward", moves)
    bench.run()
    assert bench.failure("a").code == bench.failure("b").code == "engine_error"


@pytest.mark.parametrize("where", ["residual", "logits"])
def test_row_that_is_not_finite_ends_its_request_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    bench = Bench(folder, chunk=512)
    _poison(bench, monkeypatch, 10 if where == "logits" else _token(bench, "Q"), where)
    last = bench.tokenizer.chat([Message(Role.USER, "")]).tokens[-1]
    if where == "logits":
        _poison(bench, monkeypatch, last, where)
        bench.submit(ask("bad", "hello"))
        bench.run()
        assert bench.failure("bad").code == "engine_error"
        return
    for name, text in (("good", "hello"), ("bad", "Quit"), ("fine", "so")):
        bench.submit(ask(name, text))
    bench.submit(ask("steered", "Quit", steer=(Steer("add", "calm", 0.1),)))
    bench.submit(Scan("scan", (Message(Role.USER, "Quit"),)))
    bench.submit(Embed("embed", ("fine", "Quit")))
    bench.submit(ScoreText("score", "Quit", prompt="a"))
    bench.run()
    assert isinstance(bench.events["good"][-1], Done)
    assert isinstance(bench.events["fine"][-1], Done)
    for name in ("bad", "scan", "embed", "score"):
        assert bench.failure(name).code == "engine_error"
    assert bench.failure("steered").code == "steering_diverged"
    assert bench.n_used == 0


@pytest.mark.parametrize("kind", MODELS)
def test_row_that_its_steering_drives_away_ends_alone(folder: Path, kind: str) -> None:
    bench = Bench(folder, kind)
    object.__setattr__(bench.library.directions["calm"], "training_max", 1e37)
    bench.submit(ask("wild", "hello", steer=(Steer("add", "calm", 100.0, scope="answer"),)))
    bench.submit(ask("calm", "hello", steer=(Steer("add", "sae/1", 1.0),)))
    bench.submit(ask("plain", "hello"))
    bench.run()
    assert bench.failure("wild").code == "steering_diverged"
    assert len(bench.tokens("wild")) == 1  # chosen from the prompt, which is not steered
    alone = Bench(folder, kind)
    alone.submit(ask("plain", "hello"))
    alone.submit(ask("calm", "hello", steer=(Steer("add", "sae/1", 1.0),)))
    alone.run()
    assert bench.text("plain") == alone.text("plain")
    assert bench.text("calm") == alone.text("calm")
    after = Bench(folder, kind) if kind == "reference" else bench
    after.submit(ask("after", "hello"))  # the memory that the diverged one had is used again
    after.run()
    assert after.text("after") == alone.text("plain")


def test_scan_beside_others_is_whole(folder: Path) -> None:
    """Alone a scan stops early; beside others its last layers are of no use and not looked at."""
    messages = (Message(Role.USER, "x" * 100),)
    alone, beside = Bench(folder, chunk=32), Bench(folder, chunk=32)
    for bench in (alone, beside):
        bench.submit(Scan("s", messages))
        bench.step(2)
        if bench is beside:
            bench.submit(ask("r", "hello"))
        bench.run()
    np.testing.assert_array_equal(alone.logits("s"), beside.logits("s"))
