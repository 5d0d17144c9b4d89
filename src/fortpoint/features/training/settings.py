"""What a training run is: the numbers that decide which dictionary comes out."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fortpoint.errors import InvalidRequest
from fortpoint.features.sae import MAX_FEATURES

Architecture = Literal["batchtopk", "topk", "jumprelu", "matryoshka"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. Activations are centred and scaled to a mean square of 1 before it sees them.

    ``k`` is how many features are active at a token: each token's own (``topk``), or on average
    (``batchtopk``, ``matryoshka``; for ``jumprelu`` the goal of its sparsity loss).
    ``learning_rate`` 0 means ``2e-4 / sqrt(d_sae / 2**14)``, as Gao et al. (arXiv 2406.04093)
    scale it. Gradients, of the mean squared error, are shortened to a norm of ``clip``: so low
    that the first and largest do not fill Adam's second moment. A feature that was not active
    for ``dead_after`` tokens gets the auxiliary loss.
    ``prefixes`` are Matryoshka's nested sizes; the whole dictionary is added to them.
    """

    architecture: Architecture = "batchtopk"
    d_sae: Annotated[int, Meta(ge=2, le=MAX_FEATURES)] = 4608
    k: Annotated[int, Meta(ge=1)] = 40
    batch: Annotated[int, Meta(ge=16, le=65_536)] = 2048
    epochs: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    learning_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    warmup_steps: Annotated[int, Meta(ge=0)] = 1000
    decay_share: Annotated[float, Meta(ge=0, le=1)] = 0.2
    clip: Annotated[float, Meta(gt=0)] = 0.01
    dead_after: Annotated[int, Meta(ge=1)] = 200_000
    auxiliary: Annotated[float, Meta(ge=0, le=1)] = 1 / 32
    prefixes: tuple[Annotated[int, Meta(ge=1)], ...] = ()
    bandwidth: Annotated[float, Meta(gt=0, le=10)] = 0.1
    sparsity: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    seed: int = 0

    def check(self) -> None:
        """What types cannot say. Raises ``InvalidRequest``."""
        if self.k > self.d_sae:
            raise InvalidRequest("k is larger than the dictionary", param="k")
        nested = self.architecture == "matryoshka"
        sound = list(self.prefixes) == sorted({p for p in self.prefixes if p < self.d_sae})
        if bool(self.prefixes) != nested or not sound:
            raise InvalidRequest(
                "prefixes are ascending sizes below d_sae, for a matryoshka dictionary alone",
                param="prefixes",
            )

    @property
    def rate(self) -> float:
        return self.learning_rate or 2e-4 / math.sqrt(self.d_sae / 2**14)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the nested dictionaries end."""
        return (*self.prefixes, self.d_sae)

    def rate_at(self, step: int, n_steps: int) -> float:
        """The learning rate of step ``step`` (from 0): warm-up, plateau, linear decay."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1)) if self.warmup_steps else 1.0
        n_decay = max(1, round(self.decay_share * n_steps))
        return self.rate * warm * min(1.0, (n_steps - step) / n_decay)
