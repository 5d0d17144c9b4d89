"""dictionary_learning: its ``trainSAE`` over our batches.

    python run_dictionary_learning.py '{"architecture": "topk", "autocast": false, ...}'

On a CPU it does not autocast itself; its loop runs within autocast of ours where that is asked.
"""

from __future__ import annotations

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from turns import Turns

KINDS = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}


def main() -> None:
    turns = Turns(("dictionary-learning", "torch"))
    given = turns.given
    made = []

    class Kept(KINDS[given["architecture"]]):
        """``trainSAE`` makes its trainer and gives it to nobody."""

        def __init__(self, **settings: object) -> None:
            super().__init__(**settings)
            if given["compile"]:
                self.loss = torch.compile(self.loss)
            made.append(self)

    settings = {
        "trainer": Kept,
        "steps": turns.n_steps,
        "activation_dim": turns.d_in,
        "dict_size": given["d_sae"],
        "k": given["k"],
        "layer": 0,
        "lm_name": "cached",
        "lr": given["rate"],
        "warmup_steps": given["warmup"],
        "decay_start": turns.n_steps - given["decay"],
        "device": "cpu",
        "seed": 0,
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=given["autocast"]):
        trainSAE(turns, [settings], steps=turns.n_steps, device="cpu")
    learned = made[0].ae.eval()

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = learned.encode(x, use_threshold=False)
        return learned.decode(acts), acts

    turns.finish(reconstruct)


if __name__ == "__main__":
    main()
