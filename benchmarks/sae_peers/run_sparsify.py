"""sparsify: its ``Trainer`` on a model whose one layer gives our batches.

    python run_sparsify.py '{"optimizer": "adam", ...}'

It trains on what a model computes. Here that model looks its activations up, so that all that
takes time is the training. On a CPU it does not autocast itself; its loop runs within autocast
of ours where that is asked.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from types import SimpleNamespace

import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset
from turns import Turns


class Steps(Dataset):
    """Sequences as long as a batch; the tokens are never looked at."""

    def __init__(self, turns: Turns) -> None:
        self._length, self._n = turns.given["batch"], turns.n_steps + 1

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(self._length, dtype=torch.long)}


class CachedModel(nn.Module):
    """As much of a transformer as ``Trainer`` looks at."""

    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(num_hidden_layers=1)
    dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}  # noqa: RUF012

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self._turns = turns

    @property
    def base_model(self) -> CachedModel:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] == 1:  # it asks for the width
            return self.layer(torch.zeros(1, 1, self._turns.d_in))
        return self.layer(next(self._turns)[None])


def main() -> None:
    turns = Turns(("eai-sparsify", "torch"))
    given = turns.given
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            TrainConfig(
                SparseCoderConfig(num_latents=given["d_sae"], k=given["k"]),
                batch_size=1,
                optimizer=given["optimizer"],
                lr_warmup_steps=given["warmup"],
                auxk_alpha=1 / 32,
                hookpoints=["layer"],
                save_every=10**9,
                save_dir=scratch,
                log_to_wandb=False,
            ),
            Steps(turns),
            CachedModel(turns),
        )
        (learned,) = trainer.saes.values()
        if given["compile"]:
            learned.forward = torch.compile(learned.forward)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=given["autocast"])
        with autocast, suppress(StopIteration):  # the batch after the last
            trainer.fit()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, pre = learned.encode(x)
        acts = torch.zeros_like(pre).scatter_(1, indices, values)
        return learned.decode(values, indices), acts

    turns.finish(reconstruct)


if __name__ == "__main__":
    main()
