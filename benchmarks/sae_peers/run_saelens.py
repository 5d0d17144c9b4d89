"""SAELens: its ``SAETrainer`` over our batches.

python run_saelens.py '{"architecture": "topk", "autocast": false, "compile": false, ...}'
"""

from __future__ import annotations

from contextlib import suppress

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from turns import Turns

KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def main() -> None:
    turns = Turns(("sae-lens", "torch"))
    given = turns.given
    kind, config = KINDS[given["architecture"]]
    sparse = {"use_sparse_activations": True} if given["sparse"] else {}
    sae = kind(config(d_in=turns.d_in, d_sae=given["d_sae"], k=given["k"], **sparse))
    if given["compile"]:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=(turns.n_steps + 1) * given["batch"],
            train_batch_size_samples=given["batch"],
            lr=given["rate"],
            lr_end=0.0,
            lr_warm_up_steps=given["warmup"],
            lr_decay_steps=given["decay"],
            autocast=given["autocast"],
        ),
        sae,
        turns,
    )
    with suppress(StopIteration):  # the batch after the last
        trainer.fit()
    sae.eval()

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = sae.encode(x)
        return sae.decode(acts), acts

    turns.finish(reconstruct)


if __name__ == "__main__":
    main()
