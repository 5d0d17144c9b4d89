"""Writes a concept where the engine finds it: the two files of a named direction.

The card says how the direction was made and how well it did, and which examples they were by
number and hash; what they say stays with whoever wrote them. Both files appear whole, the card
last, and without a card a direction is not there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fortpoint.errors import InvalidRequest, StorageError
from fortpoint.features.concepts.discriminant import SHRINKAGE
from fortpoint.features.concepts.examples import Examples, digest
from fortpoint.features.concepts.learn import Concept, Settings
from fortpoint.features.library import DIRECTIONS, check_name
from fortpoint.features.sae import CONFIG
from fortpoint.vault import tensor_writer


def check_free(features: Path, name: str, *, replace: bool = False) -> None:
    """Raises ``InvalidRequest`` for a name that is none or taken. ``features`` is the home's."""
    check_name(name)
    if (features / name / CONFIG).exists():
        raise InvalidRequest(f"a dictionary has the name {name!r}; choose another", param="name")
    if (features / DIRECTIONS / f"{name}.json").exists() and not replace:
        raise InvalidRequest(
            f"there is a direction {name!r} already; choose another name, or --replace it",
            param="name",
        )


def card(
    concept: Concept, examples: Examples, settings: Settings, model: str, model_digest: str
) -> dict[str, Any]:
    """What ``<name>.json`` says; the first four keys are those that a reader needs."""
    return {
        "model": model,
        "hook": "resid_post",
        "layer": concept.layer,
        "training_maximum": concept.maximum,
        "kind": "concept",
        "model_digest": model_digest,
        "method": {
            "reader": "linear discriminant",
            "decoder": "difference of means",
            "shrinkage": SHRINKAGE,
            "score": "largest token",
            "max_false_positive_rate": settings.max_false_positive_rate,
            "seed": settings.seed,
        },
        "examples": {
            "positives": _named(examples.positives),
            "negatives": _named(examples.negatives),
        },
        "quality": msgspec.to_builtins(concept.quality),
        "auroc_by_layer": {str(layer): value for layer, value in concept.layers.items()},
    }


def write(features: Path, name: str, concept: Concept, described: dict[str, Any]) -> Path:
    """Returns the card's path. Raises ``StorageError``; then what was there is as it was."""
    folder = features / DIRECTIONS
    card_file, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    new_card, new_weights = folder / f"{name}.json.new", folder / f"{name}.safetensors.new"
    tensors = {
        "direction": concept.reader,
        "decoder": concept.writer,
        "bias": np.array(concept.threshold, np.float32),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        new_card.write_bytes(msgspec.json.format(msgspec.json.encode(described), indent=2))
        tensor_writer.write(new_weights, tensors)
        card_file.unlink(missing_ok=True)  # an old card never describes new numbers
        os.replace(new_weights, weights)
        os.replace(new_card, card_file)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            new_card.unlink(missing_ok=True)
            new_weights.unlink(missing_ok=True)
    return card_file


def _named(texts: tuple[str, ...]) -> dict[str, Any]:
    return {"n": len(texts), "sha256": digest(texts).removeprefix("sha256:")}
