"""A named direction in the residual stream: a concept found with labelled examples.

``<name>.safetensors`` holds ``direction`` ``[d_model]`` of length 1 and, where it has one, the
number ``bias`` and the vector ``decoder`` ``[d_model]``; ``<name>.json`` says where it reads:

    {"model": "smollm2-135m", "hook": "resid_post", "layer": 15, "training_maximum": 12.5}

At a token with residual ``x`` its activation is ``relu(x . direction - bias)``: it acts as a
dictionary of one feature whose encoder is the direction, and whose decoder is ``decoder`` or,
where there is none, the direction too. What reads a concept best (it looks past the ways text
varies anyhow) is not what steers best, hence the two. The unit of strengths and readings is
``training_maximum``, the largest activation in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.vault import tensor_file

Floats = NDArray[np.float32]

_MAX_CARD_BYTES = 64 * 1024
_LENGTH_TOLERANCE = 0.01  # a direction stored in bfloat16 is off by less
_MAX_DECODER_LENGTH = 1e4


class _Card(msgspec.Struct, frozen=True):
    """What ``<name>.json`` must say; more may stand there (how it was made, how good it is)."""

    model: str
    hook: str
    layer: int
    training_maximum: float


@dataclass(frozen=True, eq=False)
class Direction:
    """``vector`` (length 1) reads, ``decoder`` steers: ``[d_model]`` float32 both."""

    name: str
    model: str
    layer: int
    vector: Floats
    bias: float
    training_max: float
    decoder: Floats | None = None

    @property
    def steering(self) -> Floats:
        """What a unit of activation adds to the stream."""
        return self.vector if self.decoder is None else self.decoder

    @classmethod
    def load(cls, stem: Path, d_model: int, n_layers: int) -> Direction:
        """``stem.json`` and ``stem.safetensors``. Raises ``ModelError``."""
        name = stem.name
        card = _card(stem.with_name(f"{name}.json"))
        if card.hook != "resid_post" or not 0 <= card.layer < n_layers:
            raise ModelError(f"it does not read resid_post of a layer from 0 to {n_layers - 1}")
        if not (math.isfinite(card.training_maximum) and card.training_maximum > 0):
            raise ModelError("its training_maximum is not a positive number")
        file = stem.with_name(f"{name}.safetensors")
        optional: dict[str, tuple[int, ...]] = {"bias": (), "decoder": (d_model,)}
        tensors = tensor_file.read(file, {"direction": (d_model,)}, optional)
        vector = tensors["direction"].astype(np.float64)
        length = float(np.linalg.norm(vector))
        if abs(length - 1.0) > _LENGTH_TOLERANCE:
            raise ModelError("its direction does not have length 1; divide it by its norm")
        return cls(
            name=name,
            model=card.model,
            layer=card.layer,
            vector=(vector / length).astype(np.float32),
            bias=float(tensors["bias"]) if "bias" in tensors else 0.0,
            training_max=card.training_maximum,
            decoder=_decoder(tensors.get("decoder")),
        )


def _decoder(decoder: Floats | None) -> Floats | None:
    if decoder is not None and not 0 < np.linalg.norm(decoder) <= _MAX_DECODER_LENGTH:
        raise ModelError(f"its decoder's length is not between 0 and {_MAX_DECODER_LENGTH:g}")
    return decoder


def _card(path: Path) -> _Card:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CARD_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}") from None
    if len(text) > _MAX_CARD_BYTES:
        raise ModelError(f"{path.name} is larger than {_MAX_CARD_BYTES} bytes")
    try:
        return msgspec.json.decode(text, type=_Card)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ModelError(f"{path.name} does not describe a direction") from None
