"""A run learns, is measured on what it never saw, and goes on after it was stopped."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harvested
from fortpoint.errors import ConfigError, ModelError, StorageError
from fortpoint.features.activations import ActivationStore
from fortpoint.features.training import checkpoint, recipe, report, run
from fortpoint.features.training.export import dictionary_of
from fortpoint.features.training.measure import measure_losses, pass_over
from fortpoint.features.training.settings import Settings

SETTINGS = Settings(
    d_sae=96, k=3, batch=256, epochs=20, warmup_steps=0, learning_rate=4e-3, dead_after=5000
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return harvested.store(tmp_path_factory.mktemp("run") / "harvest", n_shards=8)


def quiet(stage: str, done: int, total: int, /, note: str = "") -> None:
    pass


def planned(store: ActivationStore, **changes: Any) -> checkpoint.Run:
    settings = Settings(
        **{**{f: getattr(SETTINGS, f) for f in SETTINGS.__struct_fields__}, **changes}
    )
    return run.plan_run(store, harvested.LAYER, settings, n_held_out=2)


def test_run_explains_held_out_activations_and_leaves_its_metrics(
    store: ActivationStore, tmp_path: Path
) -> None:
    trainer, scaling = run.train(tmp_path, planned(store), store, quiet)
    dictionary = dictionary_of(trainer, scaling, "made", harvested.LAYER)
    passed = pass_over(dictionary, store, store.shards[-2:])
    assert passed.explained > 0.75
    assert passed.n_tokens == 2 * (2048 - 32)
    assert passed.l0 == pytest.approx(3, rel=0.25)
    assert passed.explained_with_sinks != pytest.approx(passed.explained, abs=0.001)
    assert passed.frequency.shape == passed.maximum.shape == (96,)
    lines = list(checkpoint.read_metrics(tmp_path))
    assert [line.step for line in lines] == list(range(50, trainer.n_done + 1, 50))
    assert lines[-1].fvu < lines[0].fvu
    report.write(
        tmp_path / "report.html",
        "made",
        planned(store),
        lines,
        passed,
        report.quality_of(passed, None),
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "<script" not in page
    assert f"{passed.explained:.4f}" in page


def test_run_that_was_stopped_goes_on_and_ends_the_same(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(store, epochs=4)
    whole, _ = run.train(tmp_path / "whole", plan, store, quiet)
    monkeypatch.setattr(run, "CHECKPOINT_S", -1.0)

    def stop(stage: str, done: int, total: int, /, note: str = "") -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(tmp_path / "cut", plan, store, stop)
    again, _ = run.train(tmp_path / "cut", plan, store, quiet)
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(value, again.parameters[name], err_msg=name)
    steps = [line.step for line in checkpoint.read_metrics(tmp_path / "cut")]
    assert steps == sorted(set(steps))


def test_run_refuses_the_folder_of_another(store: ActivationStore, tmp_path: Path) -> None:
    run.train(tmp_path, planned(store, epochs=1), store, quiet)
    with pytest.raises(ModelError, match="another run"):
        run.train(tmp_path, planned(store, epochs=1, k=4), store, quiet)


def test_run_on_a_full_disk_keeps_the_checkpoint_before(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(store, epochs=1)
    run.train(tmp_path, plan, store, quiet)
    before = (tmp_path / checkpoint.CHECKPOINT).read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        run.train(tmp_path, plan, store, quiet)
    assert (tmp_path / checkpoint.CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


class Stream:
    """Losses that grow with how far the replaced stream is from the real one."""

    def __init__(self, store: ActivationStore) -> None:
        from fortpoint.features.activations import widen

        shard = store.shards[-1]
        texts, rows = shard.tokens.reshape(-1, 64), widen(shard.bits(1)).reshape(-1, 64, 32)
        self._rows = {bytes(text): x for text, x in zip(texts, rows, strict=True)}

    def losses(
        self, sequences: Sequence[Sequence[int]], layer: int | None = None, replace: Any = None
    ) -> Any:
        found = []
        for tokens in sequences:
            x = self._rows[bytes(np.array(tokens, np.int32))]
            made = x if replace is None else replace(x, np.arange(64))
            assert (made[0] == x[0]).all()
            found.append(2 + np.square(made - x).mean(axis=1)[1:])
        return np.concatenate(found).astype(np.float32)


def test_losses_are_told_against_zeros_and_the_mean(store: ActivationStore, tmp_path: Path) -> None:
    trainer, scaling = run.train(tmp_path, planned(store, epochs=5), store, quiet)
    dictionary = dictionary_of(trainer, scaling, "made", harvested.LAYER)
    losses = measure_losses(dictionary, store, store.shards[-1:], Stream(store))
    assert losses.clean == pytest.approx(2)
    assert losses.clean < losses.replaced < losses.averaged < losses.zeroed
    assert 0 < losses.recovered_against_mean < losses.recovered_against_zero < 1
    assert losses.rise == pytest.approx(losses.replaced - 2)


RECIPE = """
name = "mine"
model = "tiny"
layer = 1
texts = ["a.jsonl"]
[harvest]
tokens = 50_000
[training]
d_sae = 64
k = 4
"""


def test_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    read = recipe.read(path)
    assert (read.name, read.layer, read.training.d_sae, read.harvest.tokens) == (
        "mine",
        1,
        64,
        50_000,
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("layer = 1", "layre = 1", "did you mean 'layer'"),
        ("d_sae", "dsae", "did you mean 'd_sae'"),
        ("d_sae = 64", "d_sae = -1", "d_sae"),
        ("k = 4", "k = 65", "larger"),
        ('name = "mine"', 'name = "../mine"', "name"),
        ("layer = 1", "layer = ", "TOML"),
    ],
)
def test_recipe_with_a_mistake_is_refused_by_name(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    from fortpoint.errors import FortPointError

    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(FortPointError, match=said):
        recipe.read(path)


def test_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        recipe.read(tmp_path / "none.toml")


def test_metrics_with_a_torn_last_line_are_read_up_to_it(tmp_path: Path) -> None:
    line = checkpoint.Measured(50, 100, 1.0, 0.5, 3.0, 0, 1e-3, 100.0)
    checkpoint.add_metrics(tmp_path, line)
    with (tmp_path / checkpoint.METRICS).open("a") as file:
        file.write(json.dumps({"step": 100})[:5])
    assert list(checkpoint.read_metrics(tmp_path)) == [line]


@pytest.mark.parametrize(("beside", "share"), [("", 1.0), ("1", 1.0), ("2", 0.5), ("many", 1.0)])
def test_processes_of_one_machine_share_its_cores(
    beside: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert run.own_threads() == 8 * share
