"""``fortpoint features export`` and ``import``, on a home with a model that has no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from gguf import GGUFReader
from typer.testing import CliRunner

from fortpoint.cli.features_export import export, import_
from fortpoint.errors import FortPointError, InvalidRequest, ModelError, NotFound
from fortpoint.features.exchange import saelens
from fortpoint.features.sae import Dictionary
from fortpoint.vault.model_folder import write_manifest
from test_exchange_neuronpedia import feature, index_of
from test_exchange_saelens import LAYER, D, N, dictionary

app = typer.Typer()
app.command("export")(export)
app.command("import")(import_)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the dictionary ``ours`` of the model ``tiny``."""
    model = tmp_path / "home" / "models" / "tiny"
    model.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": D, "num_hidden_layers": LAYER + 1}
    (model / "config.json").write_text(json.dumps(config))
    write_manifest(model, "tiny", "made here", "none", 0)
    monkeypatch.setenv("FORTPOINT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FORTPOINT_ENGINE__MODEL", "tiny")
    saelens.write(dictionary(), tmp_path / "home" / "features" / "ours", "tiny")
    return tmp_path / "home"


def run(*words: str | Path) -> dict[str, Any]:
    """What the command prints with ``--json``. Raises what it raises."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    if isinstance(result.exception, FortPointError):
        raise result.exception
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_dictionary_exported_and_imported_is_the_same(home: Path, tmp_path: Path) -> None:
    said = run("export", "ours", "--out", tmp_path / "out", "--model-name", "org/tiny")
    assert said == {
        "target": "ours",
        "format": "saelens",
        "path": str(tmp_path / "out"),
        "n_features": N,
        "precision": "float32",
    }
    said = run("import", tmp_path / "out", "--name", "again")
    assert said == {
        "name": "again",
        "layer": LAYER,
        "n_features": N,
        "made_for": "org/tiny",
        "path": str(home / "features" / "again"),
    }
    back = Dictionary.load(home / "features" / "again", D, LAYER + 1)
    np.testing.assert_array_equal(back.encoder, dictionary().encoder)
    np.testing.assert_array_equal(back.threshold, dictionary().threshold)


def test_feature_is_exported_as_a_control_vector(home: Path, tmp_path: Path) -> None:
    words = ("export", "ours/7", "--format", "gguf", "--strength", "2")
    said = run(*words, "--out", tmp_path / "v.gguf")
    assert (said["layer"], said["strength"]) == (LAYER, 2)
    reader = GGUFReader(tmp_path / "v.gguf")
    (tensor,) = reader.tensors
    ours = dictionary()
    expected = 2 * np.float64(ours.training_max[7]) * ours.decoder[7]
    np.testing.assert_allclose(tensor.data, expected, rtol=1e-6)
    assert reader.fields["controlvector.model_hint"].contents() == "llama"


def test_features_are_exported_for_neuronpedia(home: Path, tmp_path: Path) -> None:
    index_of(*map(feature, range(N))).save(home / "features" / "ours")
    said = run("export", "ours", "--format", "neuronpedia", "--out", tmp_path / "out")
    assert (said["n_features"], said["n_activations"], said["n_explanations"]) == (N, 2 * N, N)
    source = json.loads((tmp_path / "out" / "source.jsonl").read_text())
    assert source["id"] == f"{LAYER}-res-fortpoint"


def test_features_without_an_index_are_not_exported(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="ours has no index; make one with"):
        run("export", "ours", "--format", "neuronpedia", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("ours/3",), "there is no dictionary 'ours/3'"),
        (("theirs",), r"there is no dictionary 'theirs' \(1 here: ours\)"),
        (("ours", "--format", "gguf"), "'ours' is a dictionary; name a feature"),
        (("ours/99", "--format", "gguf"), "ours has the features 0 to 39, not '99'"),
        (("ours/1", "--format", "gguf", "--strength", "0"), "a number other than 0"),
    ],
)
def test_target_that_is_none_leaves_nothing(
    home: Path, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        run("export", *words, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_place_that_is_taken_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_text("mine")
    with pytest.raises(InvalidRequest, match=r"v\.gguf is there already"):
        run("export", "ours/1", "--format", "gguf", "--out", tmp_path / "v.gguf")
    assert (tmp_path / "v.gguf").read_text() == "mine"


def test_dictionary_of_another_shape_is_not_imported(home: Path, tmp_path: Path) -> None:
    run("export", "ours", "--out", tmp_path / "out")
    config = home / "models" / "tiny" / "config.json"
    config.write_text(config.read_text().replace(f'"hidden_size": {D}', '"hidden_size": 64'))
    with pytest.raises(ModelError, match="it reads 24 numbers a token, this model has 64"):
        run("import", tmp_path / "out", "--name", "again")
    assert not (home / "features" / "again").exists()


def test_model_that_is_not_here_is_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model 'other' is not here; fetch it with"):
        run("export", "ours", "--model", "other", "--out", tmp_path / "out")


def test_model_that_does_not_say_its_size_is_said(home: Path, tmp_path: Path) -> None:
    (home / "models" / "tiny" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"config\.json of model tiny does not say its size"):
        run("export", "ours", "--out", tmp_path / "out")
