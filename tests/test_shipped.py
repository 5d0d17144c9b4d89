"""Dictionaries that come with the product: there for their own model's weights, and no other's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fortpoint.errors import ModelError
from fortpoint.features import shipped
from fortpoint.features.library import Library
from test_sae import D, tensors, write

OURS, OTHER = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32


def place(folder: Path, name: str, digest: str, scale: float = 1.0) -> Path:
    made = write(folder / name, {k: t * scale for k, t in tensors().items()})
    card = {"model": "tiny", "digest": digest, "note": "more may stand here"}
    (made / shipped.MODEL).write_text(json.dumps(card))
    return made


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    place(tmp_path / "artefacts", "tiny-l1", OURS)
    place(tmp_path / "artefacts", "other-l1", OTHER)
    return tmp_path / "artefacts"


def load(home: Path, artefacts: Path, digest: str = OURS) -> Library:
    return Library.load(home, D, 4, shipped.made_for(digest, artefacts))


def test_shipped_dictionary_is_loaded_for_its_own_weights_only(
    tmp_path: Path, artefacts: Path
) -> None:
    assert set(load(tmp_path / "home", artefacts).dictionaries) == {"tiny-l1"}
    assert set(load(tmp_path / "home", artefacts, OTHER).dictionaries) == {"other-l1"}
    nobody = load(tmp_path / "home", artefacts, "sha256:" + "00" * 32)
    assert (dict(nobody.dictionaries), dict(nobody.left_out)) == ({}, {})


def test_shipped_dictionary_can_be_named_like_any_other(tmp_path: Path, artefacts: Path) -> None:
    target = load(tmp_path / "home", artefacts).resolve("tiny-l1/7")
    assert (target.name, target.layer) == ("tiny-l1/7", 1)


def test_home_s_own_of_the_same_name_takes_its_place(tmp_path: Path, artefacts: Path) -> None:
    home = tmp_path / "home"
    write(home / "tiny-l1", {k: t * 2 for k, t in tensors().items()})
    write(home / "mine", tensors())
    library = load(home, artefacts)
    assert set(library.dictionaries) == {"tiny-l1", "mine"}
    assert np.allclose(
        library.dictionary("tiny-l1").encoder, 2 * library.dictionary("mine").encoder
    )


def test_home_s_own_that_is_broken_is_not_replaced_by_the_shipped_one(
    tmp_path: Path, artefacts: Path
) -> None:
    (tmp_path / "home" / "tiny-l1").mkdir(parents=True)
    (tmp_path / "home" / "tiny-l1" / "cfg.json").write_text("{}")
    library = load(tmp_path / "home", artefacts)
    assert dict(library.dictionaries) == {}
    assert "tiny-l1" in library.left_out


def test_shipped_dictionary_of_another_shape_is_left_out_with_its_reason(
    tmp_path: Path, artefacts: Path
) -> None:
    library = Library.load(tmp_path / "home", D * 2, 4, shipped.made_for(OURS, artefacts))
    assert "numbers a token" in library.left_out["tiny-l1"]


def test_folder_without_artefacts_ships_nothing(tmp_path: Path) -> None:
    assert shipped.made_for(OURS, tmp_path / "absent") == ()


def test_library_without_a_folder_of_its_own_has_the_shipped_ones(artefacts: Path) -> None:
    library = Library.load(None, D, 4, shipped.made_for(OURS, artefacts))
    assert set(library.dictionaries) == {"tiny-l1"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "does not name a model"),
        ('{"model": "tiny"}', "does not name a model"),
        ('{"model": "tiny", "digest": 3}', "does not name a model"),
        ("[" * 4000, "does not name a model"),
        (" " * 5000, "larger than"),
    ],
)
def test_shipped_dictionary_that_does_not_say_whose_it_is_is_refused(
    artefacts: Path, text: str, says: str
) -> None:
    (artefacts / "tiny-l1" / shipped.MODEL).write_text(text)
    with pytest.raises(ModelError, match=says):
        shipped.made_for(OURS, artefacts)


def test_package_s_own_artefacts_each_name_their_model_and_load() -> None:
    for found in sorted(shipped.ARTEFACTS.glob(f"*/{shipped.MODEL}")):
        card = shipped.read(found)
        assert card.digest.startswith("sha256:")
        config = json.loads((found.parent / "cfg.json").read_text())
        library = Library.load(None, config["d_in"], 10_000, [found.parent])
        assert dict(library.left_out) == {}
