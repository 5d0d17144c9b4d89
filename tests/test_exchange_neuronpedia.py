"""An index of features becomes rows that Neuronpedia's database takes."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.features.exchange import neuronpedia
from fortpoint.features.exchange.neuronpedia import Source, write
from fortpoint.features.sae import Dictionary
from fortpoint.features.understanding.index import (
    VERSION,
    Cluster,
    Context,
    Effect,
    Feature,
    Header,
    Index,
    Kin,
)

D, LAYER = 6, 15
SOURCE = Source("smollm2-135m", "res-fortpoint", n_layers=30)


def feature(number: int, **changes: Any) -> Feature:
    made = Feature(
        index=number,
        label=f"label {number}",
        label_score=0.875,
        labeller="",
        rule=None,
        frequency=0.0125,
        max_activation=8.0,
        histogram=(60, 30, 8, 2),
        contexts=(
            Context(("The", " Gate", "\0!"), (0, 100, 25), 1, 0),
            Context((" a", " b"), (0, 40), 1, 1),
        ),
        promoted=(Effect(" bridge", 2.5), Effect(" bay", 1.25)),
        suppressed=(Effect(" desert", -1.5),),
        neighbours=(Kin(0, 73),),
        encoder_neighbours=(),
        coactive=(),
        cluster=2,
        x=120,
        y=640,
    )
    return msgspec.structs.replace(made, **changes)


def index_of(*features: Feature) -> Index:
    n = len(features)
    header = Header(
        version=VERSION,
        dictionary="ours",
        model="smollm2-135m",
        model_digest="sha256:0",
        digest="sha256:1",
        layer=LAYER,
        n_features=n,
        n_tokens=1000,
        n_held_out_tokens=100,
        n_dead=0,
        n_judged=n,
        mean_score=0.8,
        mean_score_random=0.9,
        clusters=tuple(Cluster(f"group {n}", 1, 0, 0) for n in range(3)),
        classes=(),
        class_of_token=b"",
    )
    return Index(header, features)


def dictionary(n: int) -> Dictionary:
    rows = np.arange(n * D, dtype=np.float32).reshape(n, D) / np.float32(7)
    zeros = np.zeros(n, np.float32)
    ones = np.ones(n, np.float32)
    center = np.zeros(D, np.float32)
    return Dictionary("ours", LAYER, rows, zeros, ones, rows, center, ones, None)


def exported(folder: Path, *features: Feature) -> dict[str, list[dict[str, Any]]]:
    """All rows by file, batches one after another."""
    write(folder, dictionary(len(features)), index_of(*features), SOURCE)
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.jsonl*")):
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        name = path.parent.name if path.suffix == ".gz" else path.stem
        assert text, "an empty file cannot be imported"
        found.setdefault(name, []).extend(json.loads(line) for line in text.splitlines())
    return found


def test_feature_becomes_a_row_with_neuronpedia_s_names(tmp_path: Path) -> None:
    (row,) = exported(tmp_path / "out", feature(0))["features"]
    vector = row.pop("vector")
    assert row == {
        "modelId": "smollm2-135m",
        "layer": "15-res-fortpoint",
        "index": "0",
        "sourceSetName": "res-fortpoint",
        "creatorId": "clkht01d40000jv08hvalcvly",
        "createdAt": "2026-01-01T00:00:00.000",
        "maxActApprox": 8.0,
        "frac_nonzero": 0.0125,
        "pos_str": [" bridge", " bay"],
        "pos_values": [2.5, 1.25],
        "neg_str": [" desert"],
        "neg_values": [-1.5],
        "freq_hist_data_bar_heights": [60, 30, 8, 2],
        "freq_hist_data_bar_values": [1, 3, 5, 7],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "topkCosSimIndices": [0],
        "topkCosSimValues": [0.73],
        "hasVector": True,
        "vectorDefaultSteerStrength": 8.0,
        "hookName": "blocks.15.hook_resid_post",
    }
    np.testing.assert_allclose(vector, dictionary(1).decoder[0], atol=1e-7)


def test_context_becomes_an_activation_in_the_feature_s_own_units(tmp_path: Path) -> None:
    strongest, lesser = exported(tmp_path / "out", feature(0))["activations"]
    assert strongest["tokens"] == ["The", " Gate", " !"]  # PostgreSQL stores no zero
    assert strongest["values"] == [0, 8, 2]
    assert (strongest["maxValue"], strongest["minValue"]) == (8, 0)
    assert (strongest["maxValueTokenIndex"], strongest["qualifyingTokenIndex"]) == (1, 1)
    bins = ("binMin", "binMax", "binContains")
    assert [strongest[name] for name in bins] == [-1, 8, -1]
    assert [lesser[name] for name in bins] == [2, 4, 0.3]  # 40 % of 8 is in the second bar
    assert re.fullmatch(r"c[0-9a-z]{24}", strongest["id"])


def test_label_becomes_an_explanation_that_refers_to_what_is_there(tmp_path: Path) -> None:
    rows = exported(
        tmp_path / "out",
        feature(0),
        feature(1, labeller="some-model", label_score=None),
        feature(2, label="", contexts=()),
    )
    contrast, by_model = rows["explanations"]
    assert contrast["description"] == "label 0"
    assert json.loads(contrast["notes"]) == {"balanced_accuracy": 0.875}
    assert (contrast["umap_x"], contrast["umap_y"], contrast["umap_cluster"]) == (120, 640, 2)
    assert by_model["explanationModelName"] == "some-model"
    assert by_model["notes"] is None
    types = {row["name"] for row in rows["explanation_type"]}
    models = {row["name"] for row in rows["explanation_model_type"]}
    assert {contrast["typeName"], by_model["typeName"]} <= types
    assert {contrast["explanationModelName"], by_model["explanationModelName"]} <= models


def test_source_names_agree_in_all_files(tmp_path: Path) -> None:
    rows = exported(tmp_path / "out", feature(0))
    (model,), (release,) = rows["model"], rows["release"]
    (source_set,), (source,) = rows["sourceset"], rows["source"]
    assert (model["id"], model["layers"], model["dimension"]) == ("smollm2-135m", 30, D)
    assert source_set["releaseName"] == release["name"]
    assert source["setName"] == source_set["name"] == "res-fortpoint"
    assert source["id"] == rows["features"][0]["layer"]


def test_many_features_go_into_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH", 2)
    features = [feature(number) for number in range(5)]
    features[4] = feature(4, label="", contexts=())
    rows = exported(tmp_path / "out", *features)
    assert [row["index"] for row in rows["features"]] == ["0", "1", "2", "3", "4"]
    assert len({row["id"] for name in ("activations", "explanations") for row in rows[name]}) == 12
    files = sorted(path.name for path in (tmp_path / "out" / "features").iterdir())
    assert files == ["batch-0.jsonl.gz", "batch-1.jsonl.gz", "batch-2.jsonl.gz"]
    assert not (tmp_path / "out" / "activations" / "batch-2.jsonl.gz").exists()


def test_same_index_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write(tmp_path / name, dictionary(1), index_of(feature(0)), SOURCE)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_counts_of_what_was_written_are_told(tmp_path: Path) -> None:
    told = []
    found = write(
        tmp_path / "out",
        dictionary(2),
        index_of(feature(0), feature(1, label="")),
        SOURCE,
        lambda *progress: told.append(progress),
    )
    assert (found.n_features, found.n_activations, found.n_explanations) == (2, 4, 1)
    assert told == [("export", 2, 2)]


def test_index_of_another_dictionary_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="describes 1 features, ours has 2; describe it again"):
        write(tmp_path / "out", dictionary(2), index_of(feature(0)), SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_figure_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    odd = feature(0, promoted=(Effect(" bridge", float("nan")),))
    with pytest.raises(ModelError, match="not finite"):
        write(tmp_path / "out", dictionary(1), index_of(odd), SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidRequest, match="out is there already"):
        write(tmp_path / "out", dictionary(1), index_of(feature(0)), SOURCE)
