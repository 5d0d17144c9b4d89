"""Dictionaries as SAELens 6 reads and writes them; reading is ``Dictionary.load``.

    write(dictionary, Path("out/bridge"), model_name="smollm2-135m", precision="bfloat16")
    take(Path("downloads/blocks.15"), home.features, "theirs", d_model=576, n_layers=30)

A folder is ``cfg.json`` beside ``sae_weights.safetensors`` and, where maxima are known,
``feature_stats.safetensors``, which SAELens does not look at. Written are the architectures
that it computes with: ``standard``, ``jumprelu`` and ``topk``; a BatchTopK dictionary is a
JumpReLU one after training, there as here. In bfloat16 only the two matrices are rounded, and
``dtype`` stays float32: SAELens widens what it reads and computes as we do. A threshold rounded
to eight bits would move features in and out.

Not protected here: whether a dictionary was made for the model whose width it has.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.features.exchange.whole_folder import whole_folder
from fortpoint.features.library import DIRECTIONS, check_name
from fortpoint.features.sae import CONFIG, STATS, WEIGHTS, Dictionary
from fortpoint.vault import tensor_writer
from fortpoint.vault.tensor_writer import Dtype

Precision = Literal["float32", "bfloat16"]

FORMAT_VERSION = "6.54.12"
"""Of ``sae-lens``, against which ``benchmarks/saelens_agreement.py`` was run."""

_MATRICES = frozenset({"W_enc", "W_dec"})
_MAX_SHOWN = 256


def write(
    dictionary: Dictionary,
    folder: Path,
    model_name: str,
    precision: Precision = "float32",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Make ``folder``, whole or not at all; a dictionary that is there is replaced.

    ``model_name`` is the name that SAELens shows; ``metadata`` is more of what ``cfg.json`` says
    under that key. Raises ``InvalidRequest`` when something else is at ``folder``, ``ModelError``
    for values that are not finite, ``StorageError`` when it cannot be written.
    """
    tensors = _tensors(dictionary)
    matrices: Dtype = "BF16" if precision == "bfloat16" else "F32"
    kinds: dict[str, Dtype] = {name: matrices if name in _MATRICES else "F32" for name in tensors}
    config = _config(dictionary, model_name, metadata or {})
    with whole_folder(folder, replace=(folder / CONFIG).is_file()) as partial:
        if (dictionary.training_max != 1).any():
            tensor_writer.write(partial / STATS, {"max_activations": dictionary.training_max})
        tensor_writer.write(partial / WEIGHTS, tensors, kinds)
        text = msgspec.json.format(msgspec.json.encode(config), indent=2)
        (partial / CONFIG).write_bytes(text + b"\n")


def take(source: Path, features: Path, name: str, d_model: int, n_layers: int) -> Dictionary:
    """Copy a folder that fits the model into ``features`` under ``name``.

    What is checked last is the copy. Raises ``InvalidRequest`` for a name that is none or is
    taken, ``ModelError`` for a folder that does not fit, ``StorageError``.
    """
    check_name(name)
    if (features / DIRECTIONS / f"{name}.json").exists():
        raise InvalidRequest(f"a direction is called {name}; choose another name", param="name")
    _load(source, source.name, d_model, n_layers)
    with whole_folder(features / name) as partial:
        for file in (STATS, WEIGHTS, CONFIG):
            if (source / file).exists():
                shutil.copyfile(source / file, partial / file)
        _load(partial, source.name, d_model, n_layers)
    return Dictionary.load(features / name, d_model, n_layers)


class _DescribedModel(msgspec.Struct, frozen=True):
    model_name: str | None = None


class _Described(msgspec.Struct, frozen=True):
    metadata: _DescribedModel = _DescribedModel()


def described_model(folder: Path) -> str | None:
    """The model that a dictionary says it was made for, in its own words."""
    try:
        text = (folder / CONFIG).read_bytes()
        found = msgspec.json.decode(text, type=_Described).metadata.model_name
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found[:_MAX_SHOWN] if found else None


def _load(folder: Path, shown: str, d_model: int, n_layers: int) -> Dictionary:
    if not folder.is_dir():
        raise ModelError(f"{shown} is no folder; name one that holds {CONFIG} and {WEIGHTS}")
    try:
        return Dictionary.load(folder, d_model, n_layers)
    except ModelError as error:
        raise ModelError(f"{shown} cannot be used: {error.message}") from None


def _tensors(dictionary: Dictionary) -> dict[str, NDArray[np.float32]]:
    tensors: dict[str, NDArray[np.float32]] = {
        "W_enc": dictionary.encoder.T,
        "W_dec": dictionary.decoder,
        "b_enc": dictionary.bias,
        "b_dec": dictionary.center,
    }
    if _architecture(dictionary) == "jumprelu":
        tensors["threshold"] = dictionary.threshold
    return tensors


def _architecture(dictionary: Dictionary) -> str:
    has_threshold = bool((dictionary.threshold > 0).any())
    if dictionary.k is None:
        return "jumprelu" if has_threshold else "standard"
    if has_threshold:
        raise ModelError("SAELens has no dictionary with thresholds that keeps the k largest too")
    return "topk"


def _config(dictionary: Dictionary, model_name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    d_sae, d_in = dictionary.encoder.shape
    config: dict[str, Any] = {
        "architecture": _architecture(dictionary),
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            **metadata,
            "model_name": model_name,
            "hook_name": f"blocks.{dictionary.layer}.hook_resid_post",
            "sae_lens_version": FORMAT_VERSION,
        },
    }
    if dictionary.k is not None:
        config |= {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}
    return config
