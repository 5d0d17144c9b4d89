"""A model's unembedding with its final norm folded in: what the residual stream says in tokens.

    readout = read_unembedding(folder)     # [n_vocab, d_model] float32
    logits = x @ readout.T                 # up to the scale that the norm divides by

Read from the checkpoint alone, without loading the model. Not here: models whose final norm is
no RMSNorm with plain weights; their readout would be another.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fortpoint.engine.architecture import Architecture
from fortpoint.engine.checkpoint import Checkpoint


def read_unembedding(folder: Path) -> NDArray[np.float32]:
    """``[n_vocab, d_model]`` of the model in ``folder``: the output matrix, or the embedding
    where the two are tied, times the final norm's weights.

    Raises ``ModelError`` for a model outside the family that the fast path computes, and for
    weights that are absent or of another shape.
    """
    architecture = Architecture.load(folder)
    checkpoint = Checkpoint(folder)
    name = "model.embed_tokens.weight" if architecture.tied else "lm_head.weight"
    matrix = checkpoint.get(name, (architecture.vocab_size, architecture.d_model))
    matrix *= checkpoint.get("model.norm.weight", (architecture.d_model,))
    return matrix
