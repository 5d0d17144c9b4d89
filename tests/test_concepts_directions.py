"""A concept's files are what the engine loads, and appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from concept_world import N_LAYERS, POSITIVES, D, Words, World
from fortpoint.engine.protocol import Condition, Steer
from fortpoint.engine.steering import Edits, Plan, Steered
from fortpoint.errors import InvalidRequest, ModelError, StorageError
from fortpoint.features.concepts import direction_files
from fortpoint.features.concepts.examples import Examples
from fortpoint.features.concepts.learn import Concept, Settings, learn
from fortpoint.features.directions import Direction
from fortpoint.features.library import Library

EXAMPLES = Examples(POSITIVES)
SETTINGS = Settings(layers=(3, 4, 5))


@pytest.fixture(scope="module")
def concept() -> Concept:
    return learn(EXAMPLES, Words(), World(), SETTINGS)


def put(features: Path, concept: Concept, name: str = "bridge") -> dict:
    card = direction_files.card(concept, EXAMPLES, SETTINGS, "tiny", "sha256:00")
    path = direction_files.write(features, name, concept, card)
    return json.loads(path.read_bytes())


def test_written_concept_is_a_direction_of_the_library(tmp_path: Path, concept: Concept) -> None:
    put(tmp_path, concept)
    library = Library.load(tmp_path, D, N_LAYERS)
    assert library.left_out == {}
    target = library.resolve("bridge")
    np.testing.assert_allclose(target.encoder, concept.reader, atol=1e-6)
    np.testing.assert_allclose(target.decoder, concept.writer, rtol=1e-6)
    assert target.layer == concept.layer
    assert target.bias == pytest.approx(-concept.threshold, rel=1e-6)
    assert target.training_max == pytest.approx(concept.maximum)


def test_direction_made_in_memory_is_the_one_on_disk(tmp_path: Path, concept: Concept) -> None:
    put(tmp_path, concept)
    loaded = Direction.load(tmp_path / "directions" / "bridge", D, N_LAYERS)
    made = concept.direction("bridge", "tiny")
    np.testing.assert_allclose(made.steering, loaded.steering, rtol=1e-6)
    assert (made.layer, made.name) == (loaded.layer, loaded.name)


def test_card_says_how_it_was_made_and_no_sentence(tmp_path: Path, concept: Concept) -> None:
    card = put(tmp_path, concept)
    assert card["examples"]["positives"]["n"] == 10
    assert len(card["examples"]["positives"]["sha256"]) == 64
    assert 0.9 < card["quality"]["auroc"]["low"] <= card["quality"]["auroc"]["value"]
    assert set(card["auroc_by_layer"]) == {"3", "4", "5"}
    assert card["model_digest"] == "sha256:00"
    text = json.dumps(card)
    assert not any(sentence in text for sentence in POSITIVES)


def test_clamp_with_a_decoder_of_its_own_sets_the_reading(concept: Concept) -> None:
    library = Library({}, {"bridge": concept.direction("bridge", "tiny")})
    x = np.random.default_rng(0).standard_normal((4, D)).astype(np.float32)
    x += np.outer([0.0, 1.0, 2.0, 3.0], concept.reader * (concept.threshold + 5)).astype("f4")
    plan = Plan.compile([Steer("clamp", "bridge", 2.0)], (), library)
    edits = Edits([Steered(plan, 0, 4, 0, 0)], 4)
    before = np.maximum(x @ concept.reader - concept.threshold, 0)
    got = x.copy()
    edits.apply(concept.layer, got)
    goal = 2.0 * concept.maximum
    np.testing.assert_allclose(
        got, x + np.outer(goal - before, concept.writer), rtol=1e-3, atol=1e-3
    )
    active = before > 0
    after = got @ concept.reader - concept.threshold
    np.testing.assert_allclose(after[active], goal, rtol=1e-3)


def test_condition_above_zero_is_the_calibrated_threshold(concept: Concept) -> None:
    library = Library({}, {"bridge": concept.direction("bridge", "tiny")})
    x = np.outer([-0.01, 0.01], concept.reader) + concept.threshold * concept.reader
    plan = Plan.compile((), [Condition("bridge", 0.0)], library)
    edits = Edits([Steered(plan, 0, 2, 0, 0)], 2)
    edits.apply(concept.layer, x.astype(np.float32))
    assert edits.outcome().stopped == {1}


def test_direction_without_decoder_steers_along_itself(tmp_path: Path) -> None:
    folder = tmp_path / "directions"
    folder.mkdir()
    card = {"model": "tiny", "hook": "resid_post", "layer": 1, "training_maximum": 4.0}
    (folder / "old.json").write_text(json.dumps(card))
    save_file({"direction": np.eye(D, dtype=np.float32)[2]}, folder / "old.safetensors")
    target = Library.load(tmp_path, D, N_LAYERS).resolve("old")
    assert np.array_equal(target.decoder, target.encoder)


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (np.zeros(D, np.float32), "decoder's length"),
        (np.full(D, 1e5, np.float32), "decoder's length"),
        (np.full(D, np.nan, np.float32), "not finite"),
        (np.ones(D + 1, np.float32), "has the shape"),
    ],
)
def test_decoder_that_is_none_refuses_the_direction(
    tmp_path: Path, concept: Concept, decoder: np.ndarray, reason: str
) -> None:
    put(tmp_path, concept)
    file = tmp_path / "directions" / "bridge.safetensors"
    save_file({**load_file(file), "decoder": decoder}, file)
    with pytest.raises(ModelError, match=reason):
        Direction.load(file.with_suffix(""), D, N_LAYERS)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, "spaced name", "ümlaut"])
def test_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="letters, digits"):
        direction_files.check_free(tmp_path, name)


def test_name_that_is_taken_is_refused_unless_replaced(tmp_path: Path, concept: Concept) -> None:
    put(tmp_path, concept)
    with pytest.raises(InvalidRequest, match="--replace"):
        direction_files.check_free(tmp_path, "bridge")
    direction_files.check_free(tmp_path, "bridge", replace=True)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="a dictionary has the name"):
        direction_files.check_free(tmp_path, "sae", replace=True)


def test_replaced_concept_leaves_nothing_of_the_old(tmp_path: Path, concept: Concept) -> None:
    put(tmp_path, concept)
    other = learn(EXAMPLES, Words(), World(), Settings(layers=(2,)))
    put(tmp_path, other)
    assert Library.load(tmp_path, D, N_LAYERS).resolve("bridge").layer == 2
    files = sorted(file.name for file in (tmp_path / "directions").iterdir())
    assert files == ["bridge.json", "bridge.safetensors"]


def test_disk_that_is_full_leaves_what_was_there(
    tmp_path: Path, concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, concept)
    before = {file: file.read_bytes() for file in (tmp_path / "directions").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = learn(EXAMPLES, Words(), World(), Settings(layers=(2,)))
    with pytest.raises(StorageError, match="No space left"):
        put(tmp_path, other)
    after = {file: file.read_bytes() for file in (tmp_path / "directions").iterdir()}
    assert after == before


def test_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path, concept: Concept) -> None:
    (tmp_path / "features").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        put(tmp_path / "features", concept)
