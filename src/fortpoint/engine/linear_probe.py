"""Linear probes read in the residual stream while it is computed.

Per token: ``logit = sum over layers l of W[l] @ (x_l / rms(x_l)) + b``, with ``x_l`` the
residual stream after block l. All probes of all layers are one small product at a step's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fortpoint.errors import ModelError

_EPS = 1e-6


class ProbeCard(msgspec.Struct, frozen=True):
    """What ``probes.json`` says of ``probes.safetensors``."""

    model: str
    hook: str
    normalise: str
    probes: tuple[str, ...]
    layers: tuple[int, ...]


class LinearProbes:
    """``W`` is ``[n_layers, n_probes, d_model]``, ``b`` is ``[n_probes]``."""

    def __init__(
        self, names: tuple[str, ...], layers: tuple[int, ...], W: Tensor, b: Tensor
    ) -> None:
        if W.shape[:2] != (len(layers), len(names)) or b.shape != (len(names),):
            raise ModelError("the linear probes' file does not fit its description")
        if not (torch.isfinite(W).all() and torch.isfinite(b).all()):
            raise ModelError("the linear probes' file holds values that are not finite")
        self.names = names
        self.layers = layers
        self.last_layer = max(layers, default=-1)
        self._weights = dict(zip(layers, W.float(), strict=True))
        self._b = b.float()

    @classmethod
    def load(cls, stem: Path, d_model: int, n_layers: int) -> LinearProbes:
        """``stem.json`` and ``stem.safetensors``. Raises ``ModelError`` for another model's."""
        try:
            card = msgspec.json.decode(stem.with_suffix(".json").read_bytes(), type=ProbeCard)
            tensors = load_file(stem.with_suffix(".safetensors"))
            probes = cls(card.probes, card.layers, tensors["W"], tensors["b"])
        except (SafetensorError, OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise ModelError(f"the linear probes cannot be read: {type(error).__name__}") from None
        fits = tensors["W"].shape[2] == d_model and probes.last_layer < n_layers
        if not fits or (card.hook, card.normalise) != ("resid_post", "rms"):
            raise ModelError("the linear probes were made for another model")
        return probes

    @classmethod
    def none(cls, d_model: int) -> LinearProbes:
        """No probes: every reading is empty."""
        return cls((), (), torch.zeros(0, 0, d_model), torch.zeros(0))

    def read(self, seen: Mapping[int, Tensor], n_rows: int) -> Tensor:
        """Logits ``[n_rows, n_probes]`` from the residuals ``[n_rows, d_model]`` of each layer."""
        logits = self.new_logits(n_rows)
        for layer in self.layers:
            self.add(layer, seen[layer], logits)
        return logits

    def new_logits(self, n_rows: int) -> Tensor:
        """The bias for each row: ``[n_rows, n_probes]``, to which ``add`` adds."""
        return self._b.repeat(n_rows, 1)

    def add(self, layer: int, x: Tensor, logits: Tensor) -> None:
        """Add layer ``layer``'s part, read from ``x`` ``[n_rows, d_model]``, in place."""
        weights = self._weights.get(layer)
        if weights is not None:
            x = x.float()
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)
            logits.addmm_(x * scale, weights.T)
