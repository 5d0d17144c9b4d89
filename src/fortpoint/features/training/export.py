"""A trained state becomes a dictionary in the model's own units.

The trainer saw ``y = (x - mean) * factor``. With its decoder rows of length 1, everything
folds back: ``center = mean + b_dec / factor``; biases, thresholds and activations are divided
by ``factor``. Those that kept the k largest of a batch become a JumpReLU with one threshold,
set so that as many features are active on average; then a token needs no others.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fortpoint.features.sae import Dictionary
from fortpoint.features.training.batches import Scaling
from fortpoint.features.training.trainer import Floats, Trainer


def dictionary_of(trainer: Trainer, scaling: Scaling, name: str, layer: int) -> Dictionary:
    """With the threshold of the training's own running mean, and units of 1: see ``calibrate``."""
    parameters, factor = trainer.parameters, np.float32(scaling.factor)
    threshold = np.full(trainer.settings.d_sae, trainer.limit, np.float32)
    if trainer.settings.architecture == "jumprelu":
        threshold = parameters["threshold"]
    elif trainer.settings.architecture == "topk":
        threshold = np.zeros_like(threshold)
    return Dictionary(
        name=name,
        layer=layer,
        encoder=parameters["W_enc"].copy(),
        bias=parameters["b_enc"] / factor,
        threshold=threshold / factor,
        decoder=parameters["W_dec"].copy(),
        center=scaling.mean + parameters["b_dec"] / factor,
        training_max=np.ones(trainer.settings.d_sae, np.float32),
        k=trainer.settings.k if trainer.settings.architecture == "topk" else None,
    )


def calibrate(dictionary: Dictionary, x: Floats, k: int) -> Dictionary:
    """With its thresholds multiplied so that ``k`` features are active on average on ``x``.

    ``x`` is ``[n, d_in]``.
    """
    over = []
    for part in np.array_split(x, max(len(x) // 1024, 1)):
        z = dictionary.preactivations(part)
        over.append((z / dictionary.threshold)[z > 0])
    shares, wanted = np.concatenate(over), k * len(x)
    limit = 0.0
    if len(shares) > wanted:
        limit = float(np.partition(shares, len(shares) - wanted)[len(shares) - wanted])
    threshold = dictionary.threshold * np.float32(limit)
    return dataclasses.replace(dictionary, threshold=threshold)
