"""Ours: the product's ``Trainer`` over the same batches, in the project's own environment.

python run_fortpoint.py '{"architecture": "batchtopk", ...}'
"""

from __future__ import annotations

import torch
from turns import Turns

from fortpoint.features.training.settings import Settings
from fortpoint.features.training.trainer import Trainer


def main() -> None:
    turns = Turns(("fortpoint", "torch", "numba"))
    given = turns.given
    settings = Settings(
        architecture=given["architecture"],
        d_sae=given["d_sae"],
        k=given["k"],
        batch=given["batch"],
        learning_rate=given["rate"],
        warmup_steps=given["warmup"],
        decay_share=given["decay"] / turns.n_steps,
    )
    trainer = Trainer(settings, turns.d_in, turns.n_steps, n_threads=given["threads"])
    for step, batch in enumerate(turns):
        x = batch.numpy()
        if step == 0:
            trainer.begin(x)
        trainer.step(x)
    learned = {name: torch.from_numpy(value) for name, value in trainer.parameters.items()}

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = (x - learned["b_dec"]) @ learned["W_enc"].T + learned["b_enc"]
        acts = _largest(z.relu(), given["k"], given["architecture"] == "topk")
        return acts @ learned["W_dec"] + learned["b_dec"], acts

    turns.finish(reconstruct)
    trainer.close()


def _largest(acts: torch.Tensor, k: int, by_token: bool) -> torch.Tensor:
    """The ``k`` largest of each token, or as many of all tokens together."""
    rows = acts if by_token else acts.reshape(1, -1)
    top = rows.topk(k if by_token else k * len(acts), dim=1)
    return torch.zeros_like(rows).scatter_(1, top.indices, top.values).reshape(acts.shape)


if __name__ == "__main__":
    main()
