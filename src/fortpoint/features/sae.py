"""A dictionary of features: the encoder and decoder of a sparse autoencoder (SAE).

It is read from a folder as SAELens 6 writes it, ``cfg.json`` beside ``sae_weights.safetensors``,
for the architectures ``standard``, ``jumprelu``, ``topk`` and ``batchtopk``, trained on a
residual stream after a block (``blocks.15.hook_resid_post``). All of them become one form:

    z = (x - center) @ encoder.T + bias
    acts = z where z > threshold, else 0;  where ``k`` is given, only the k largest of a token

Beside the weights may lie ``feature_stats.safetensors`` with ``max_activations`` ``[d_sae]``:
each feature's largest activation in training, the unit of every strength and reading. Without
that file, and for a feature that was never active (0), the unit is 1.

Not protected here: a dictionary of another model with the same width is not recognised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.vault import tensor_file

Floats = NDArray[np.float32]

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
STATS = "feature_stats.safetensors"

MAX_FEATURES = 131_072
_MAX_CONFIG_BYTES = 256 * 1024
_ARCHITECTURES = frozenset({"standard", "jumprelu", "topk", "batchtopk"})
_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_post")


class _Metadata(msgspec.Struct, frozen=True):
    hook_name: str = ""


class _Config(msgspec.Struct, frozen=True):
    """The part of ``cfg.json`` that changes what is computed."""

    architecture: str
    d_in: Annotated[int, Meta(ge=1)]
    d_sae: Annotated[int, Meta(ge=1)]
    metadata: _Metadata
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    k: float | None = None

    @property
    def layer(self) -> int:
        found = _HOOK.fullmatch(self.metadata.hook_name)
        return int(found[1]) if found else -1


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of the residual stream after block ``layer``.

    ``encoder`` and ``decoder`` are ``[d_sae, d_in]``, a row for each feature; ``bias``,
    ``threshold`` (never negative) and ``training_max`` (positive) are ``[d_sae]``; ``center``
    is ``[d_in]``. All are float32 and C-contiguous.
    """

    name: str
    layer: int
    encoder: Floats
    bias: Floats
    threshold: Floats
    decoder: Floats
    center: Floats
    training_max: Floats
    k: int | None

    @classmethod
    def load(cls, folder: Path, d_model: int, n_layers: int) -> Dictionary:
        """Raises ``ModelError`` for a folder that is malformed or made for another model."""
        config = _config(folder / CONFIG)
        _check(config, d_model, n_layers)
        d_in, d_sae = config.d_in, config.d_sae
        required = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        required["b_enc"] = (d_sae,)
        optional: dict[str, tuple[int, ...]] = {"threshold": (d_sae,), "topk_threshold": ()}
        if config.architecture == "jumprelu":
            required["threshold"] = optional.pop("threshold")
        tensors = tensor_file.read(folder / WEIGHTS, required, optional)
        return _build(folder.name, config, tensors, _training_max(folder / STATS, d_sae))

    @property
    def n_features(self) -> int:
        return len(self.bias)

    def preactivations(self, x: Floats) -> Floats:
        """``[n, d_in]`` to ``z`` ``[n, d_sae]``, in float32."""
        z = (np.asarray(x, np.float32) - self.center) @ self.encoder.T + self.bias
        return z.astype(np.float32, copy=False)

    def encode(self, x: Floats) -> Floats:
        """``[n, d_in]`` to activations ``[n, d_sae]`` in float32: the reference, not the tap."""
        z = self.preactivations(x)
        acts = np.where(z > self.threshold, z, np.float32(0))
        if self.k is None or self.k >= self.n_features:
            return acts
        others = np.argpartition(acts, -self.k, axis=-1)[:, : -self.k]
        np.put_along_axis(acts, others, 0, axis=-1)
        return acts


def _config(path: Path) -> _Config:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}") from None
    if len(text) > _MAX_CONFIG_BYTES:
        raise ModelError(f"{path.name} is larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        return msgspec.json.decode(text, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ModelError(f"{path.name} does not describe an SAE as SAELens 6 writes it") from None


def _check(config: _Config, d_model: int, n_layers: int) -> None:
    if config.architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ModelError(f"the architecture is none of {known}")
    if config.normalize_activations != "none" or config.reshape_activations != "none":
        raise ModelError("it normalises or reshapes activations; fold that into the weights first")
    if config.d_in != d_model:
        raise ModelError(f"it reads {config.d_in} numbers a token, this model has {d_model}")
    if not 0 <= config.layer < n_layers:
        raise ModelError(
            "its hook_name is not blocks.<layer>.hook_resid_post with a layer "
            f"from 0 to {n_layers - 1}"
        )
    if config.d_sae > MAX_FEATURES:
        raise ModelError(f"it has more than {MAX_FEATURES} features")
    if config.k is not None and not 1 <= config.k <= config.d_sae:
        raise ModelError("its k is not between 1 and the number of features")


def _build(
    name: str, config: _Config, tensors: dict[str, Floats], training_max: Floats
) -> Dictionary:
    encoder, decoder = np.ascontiguousarray(tensors["W_enc"].T), tensors["W_dec"]
    b_enc, b_dec = tensors["b_enc"], tensors["b_dec"]
    threshold = tensors.get("threshold")
    if config.architecture != "jumprelu" and config.rescale_acts_by_decoder_norm:
        norms = np.maximum(np.linalg.norm(decoder, axis=-1), np.float32(1e-12))
        encoder, b_enc = encoder * norms[:, None], b_enc * norms
        decoder = decoder / norms[:, None]
    if threshold is None and config.architecture == "batchtopk" and "topk_threshold" in tensors:
        threshold = np.full(config.d_sae, tensors["topk_threshold"])
    k = None
    if config.architecture in {"topk", "batchtopk"} and threshold is None:
        if config.k is None:
            raise ModelError("it has neither k nor a threshold for each feature")
        k = int(config.k)
    if threshold is None:
        threshold = np.zeros(config.d_sae, np.float32)
    bias = b_enc if config.apply_b_dec_to_input else b_enc + encoder @ b_dec
    return Dictionary(
        name=name,
        layer=config.layer,
        encoder=encoder,
        bias=bias,
        threshold=np.maximum(threshold, np.float32(0)),  # below 0 it is ReLU that cuts
        decoder=decoder,
        center=b_dec,
        training_max=training_max,
        k=k,
    )


def _training_max(path: Path, d_sae: int) -> Floats:
    if not path.exists():
        return np.ones(d_sae, np.float32)
    maxima = tensor_file.read(path, {"max_activations": (d_sae,)})["max_activations"]
    if (maxima < 0).any():
        raise ModelError(f"{path.name} holds a negative maximum")
    return np.where(maxima > 0, maxima, np.float32(1))
