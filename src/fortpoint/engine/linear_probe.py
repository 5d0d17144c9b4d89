"""Linear probes on the residual stream.

Per token: ``logit = sum over layers l of W[l] @ (x_l / rms(x_l)) + b``, with ``x_l`` the
residual stream after block l.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fortpoint.engine.compiled.reading import probe_reader
from fortpoint.errors import ModelError

Floats = NDArray[np.float32]


class ProbeCard(msgspec.Struct, frozen=True):
    """What ``probes.json`` says of ``probes.safetensors``."""

    model: str
    hook: str
    normalise: str
    probes: tuple[str, ...]
    layers: tuple[int, ...]
    digest: str = ""


class LinearProbes:
    """``W`` is ``[n_layers, n_probes, d_model]``, ``b`` is ``[n_probes]``."""

    def __init__(
        self, names: tuple[str, ...], layers: tuple[int, ...], W: Floats, b: Floats
    ) -> None:
        if W.ndim != 3 or W.shape[:2] != (len(layers), len(names)) or b.shape != (len(names),):
            raise ModelError("the linear probes' file does not fit its description")
        if not (np.isfinite(W).all() and np.isfinite(b).all()):
            raise ModelError("the linear probes' file holds values that are not finite")
        self.names = names
        self.layers = layers
        self.last_layer = max(layers, default=-1)
        self._weights = np.ascontiguousarray(W, np.float32)
        self._b = b.astype(np.float32)

    @classmethod
    def load(cls, stem: Path, d_model: int, n_layers: int, digest: str = "") -> LinearProbes:
        """``stem.json`` and ``stem.safetensors``. Raises ``ModelError`` for another model's.

        ``digest`` is that of the model that is read; a file that names another is refused.
        """
        try:
            card = msgspec.json.decode(stem.with_suffix(".json").read_bytes(), type=ProbeCard)
            tensors = load_file(stem.with_suffix(".safetensors"))
            probes = cls(card.probes, card.layers, tensors["W"], tensors["b"])
        except (SafetensorError, OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise ModelError(f"the linear probes cannot be read: {type(error).__name__}") from None
        fits = tensors["W"].shape[2] == d_model and probes.last_layer < n_layers
        if not fits or (card.hook, card.normalise) != ("resid_post", "rms"):
            raise ModelError("the linear probes were made for another model")
        if digest and card.digest and digest != card.digest:
            raise ModelError(
                f"the linear probes were made for {card.model} ({card.digest}), this model is "
                f"{digest}; train them anew with `fortpoint guard train` or serve that model"
            )
        return probes

    @classmethod
    def none(cls, d_model: int) -> LinearProbes:
        """No probes: every reading is empty."""
        return cls((), (), np.zeros((0, 0, d_model), np.float32), np.zeros(0, np.float32))

    def read(self, seen: Mapping[int, Floats], n_rows: int) -> Floats:
        """Logits ``[n_rows, n_probes]`` from the residuals ``[n_rows, d_model]`` of each layer."""
        logits = self.new_logits(n_rows)
        self.add(seen, logits)
        return logits

    def new_logits(self, n_rows: int) -> Floats:
        """The bias for each row, to which ``add`` adds."""
        return np.tile(self._b, (n_rows, 1))

    def add(self, seen: Mapping[int, Floats], logits: Floats) -> None:
        """Add what the layers say of the first rows, in place."""
        n_rows = len(logits)
        for layer, weights in zip(self.layers, self._weights, strict=True):
            x = np.ascontiguousarray(seen[layer][:n_rows], np.float32)
            n_probes, d_model = weights.shape
            probe_reader()(
                x.ctypes.data,
                n_rows,
                d_model,
                weights.ctypes.data,
                n_probes,
                logits.ctypes.data,
            )
