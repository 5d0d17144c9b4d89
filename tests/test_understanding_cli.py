"""``fortpoint features describe`` and what reads its index: what is printed, what refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from fortpoint.cli import features_understand as commands
from fortpoint.cli.features_page import bars
from fortpoint.errors import FortPointError, InvalidRequest, ModelError, NotFound
from fortpoint.features import shipped
from fortpoint.features.understanding.index import FILE, Index
from planted_features import FEATURES, FRANCISCO, LAYER, Planted, plant

app = typer.Typer()
for name in ("describe", "show", "search", "cluster"):
    app.command(name)(getattr(commands, name))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("harvest") / "activations")


def write(folder: Path, planted: Planted) -> None:
    """The dictionary as SAELens writes it."""
    folder.mkdir(parents=True)
    held = planted.dictionary
    hook = {"hook_name": f"blocks.{LAYER}.hook_resid_post"}
    config = {
        "architecture": "jumprelu", "d_in": held.encoder.shape[1], "d_sae": len(FEATURES),
        "metadata": hook,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(
        {
            "W_enc": np.ascontiguousarray(held.encoder.T), "W_dec": held.decoder,
            "b_enc": held.bias, "b_dec": held.center, "threshold": held.threshold,
        },
        folder / "sae_weights.safetensors",
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write(home / "features" / "mine", planted)
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTPOINT_HOME", str(home))
    monkeypatch.setattr(commands, "model_of", lambda store: planted.model)
    monkeypatch.setattr(shipped, "ARTEFACTS", home / "nothing ships")


@pytest.fixture(scope="module")
def described(home: Path, planted: Planted) -> Path:
    """The home once its dictionary is described."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORTPOINT_HOME", str(home))
        patch.setattr(commands, "model_of", lambda store: planted.model)
        found = json.loads(
            output(
                "describe", "mine", "--harvest", str(planted.store.folder), "--held-out", "2",
                "--json",
            )
        )  # fmt: skip
    assert found["n_dead"] == 1
    assert found["bytes"] == (home / "features" / "mine" / FILE).stat().st_size
    assert found["mean_score"] > 0.8
    return home


def test_describe_puts_index_and_map_beside_the_dictionary(described: Path) -> None:
    folder = described / "features" / "mine"
    assert Index.load(folder, len(FEATURES)).header.dictionary == "mine"
    assert (folder / "map.html").read_text().startswith("<!doctype html>")
    assert not list(folder.glob("*.partial"))


def test_show_prints_label_contexts_and_kin(described: Path) -> None:
    page = output("show", f"mine/{FRANCISCO}")
    for part in ("Francisco", "strongest", "raises", "' Bay'", "active with", "predicts unseen"):
        assert part in page, part


def test_show_as_json_names_every_field(described: Path) -> None:
    shown = json.loads(output("show", f"mine/{FRANCISCO}", "--json"))
    assert shown["contexts"][0]["tokens"][shown["contexts"][0]["peak"]] == " Francisco"
    assert shown["rule"]["terms"]
    assert shown["dictionary"] == "mine"


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("mine", InvalidRequest),
        ("mine/", InvalidRequest),
        ("mine/x", InvalidRequest),
        ("mine/-1", InvalidRequest),
        ("mine/8", InvalidRequest),
        ("mine/٣", InvalidRequest),
        ("mine/99999999999", InvalidRequest),
        ("other/1", NotFound),
        ("/1", NotFound),
        ("../features/mine/../other/1", NotFound),
        ("\x1b[2J/1", NotFound),
    ],
)
def test_show_of_what_is_not_there_is_an_error(
    described: Path, target: str, error: type[FortPointError]
) -> None:
    result = run("show", target)
    assert isinstance(result.exception, error)


def test_search_by_words_finds_the_planted_feature(described: Path) -> None:
    rows = json.loads(output("search", "san francisco", "--json"))
    assert rows[0]["feature"] in {f"mine/{FRANCISCO}", "mine/7"}
    assert rows[0]["label_score"] > 0.9
    assert "rancisco" in output("search", "francisco")


def test_search_for_what_is_nowhere_says_so(described: Path) -> None:
    assert output("search", "zzqqxx") == "nothing found\n"
    assert json.loads(output("search", "zzqqxx", "--json")) == []


@pytest.mark.parametrize("arguments", [[], ["a", "--text", "b"], ["x" * 100_001]])
def test_search_for_nothing_or_two_things_is_an_error(
    described: Path, arguments: list[str]
) -> None:
    assert isinstance(run("search", *arguments).exception, InvalidRequest)


def test_search_in_a_dictionary_without_an_index_says_how_to_make_one(
    described: Path, planted: Planted, tmp_path: Path
) -> None:
    write(tmp_path / "bare", planted)
    result = run("search", "x", "--in", str(tmp_path / "bare"))
    assert isinstance(result.exception, NotFound)
    assert "fortpoint features describe" in result.exception.message


def test_cluster_again_changes_clusters_alone(described: Path, planted: Planted) -> None:
    folder = described / "features" / "mine"
    before = Index.load(folder)
    rows = json.loads(
        output(
            "cluster", "mine", "--harvest", str(planted.store.folder), "--clusters", "2", "--json"
        )
    )
    after = Index.load(folder)
    assert sum(row["features"] for row in rows) == len(FEATURES) - 1
    assert [f.label for f in after.features] == [f.label for f in before.features]
    assert after.header.mean_score == before.header.mean_score


def test_describe_of_a_layer_that_was_not_harvested_writes_nothing(
    planted: Planted, tmp_path: Path
) -> None:
    write(tmp_path / "other", planted)
    config = json.loads((tmp_path / "other" / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.9.hook_resid_post"
    (tmp_path / "other" / "cfg.json").write_text(json.dumps(config))
    result = run("describe", str(tmp_path / "other"), "--harvest", str(planted.store.folder))
    assert isinstance(result.exception, ModelError)
    assert not (tmp_path / "other" / FILE).exists()


def test_describe_without_a_harvest_says_how_to_make_one(described: Path, tmp_path: Path) -> None:
    result = run("describe", "mine", "--harvest", str(tmp_path))
    assert isinstance(result.exception, NotFound)
    assert "fortpoint features harvest" in result.exception.message


def test_bars_show_small_counts_and_leave_zeros_out() -> None:
    assert bars([100, 50, 1, 0]) == "█▄▁ "
    assert bars([0, 0]) == "  "
    assert bars([]) == ""
