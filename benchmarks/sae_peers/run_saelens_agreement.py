"""SAELens's side of `saelens_agreement.py`, in its own environment.

    python run_saelens_agreement.py '{"x": FILE, "read": [FOLDER, ...], "write": FOLDER, ...}'

Each folder of ``read`` is loaded with ``SAE.load_from_disk``, and what it computes of ``x`` is
left in it: ``acts.npy`` and ``made.npy``. Then a dictionary of each architecture is trained a
little and saved below ``write``, as a checkpoint and for inference, with the same two files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata

BATCH = 256
STEPS = 20
ROWS = 1024


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.manual_seed(0)
    x = torch.from_numpy(np.load(given["x"]))
    for folder in given["read"]:
        leave(Path(folder), x)
    for name, kind, config in architectures(given["k"], given["d_sae"]):
        learned = train(kind, config, x, given)
        folder = Path(given["write"])
        learned.save_inference_model(folder / name)
        learned.save_model(folder / f"{name}-checkpoint")
        leave(folder / name, x)
    print(json.dumps({"sae-lens": metadata.version("sae-lens"), "torch": torch.__version__}))


@torch.no_grad()
def leave(folder: Path, x: torch.Tensor) -> None:
    sae = SAE.load_from_disk(folder, device="cpu")
    parts = [sae.encode(rows) for rows in x.split(ROWS)]
    np.save(folder / "made.npy", torch.cat([sae.decode(part) for part in parts]).numpy())
    np.save(folder / "acts.npy", torch.cat(parts).numpy())


def architectures(k: int, d_sae: int) -> list[tuple[str, type, tuple[type, dict]]]:
    return [
        ("standard", StandardTrainingSAE, (StandardTrainingSAEConfig, {"l1_coefficient": 1.0})),
        (
            "jumprelu",
            JumpReLUTrainingSAE,
            (JumpReLUTrainingSAEConfig, {"jumprelu_init_threshold": 2.0}),
        ),
        ("topk", TopKTrainingSAE, (TopKTrainingSAEConfig, {"k": k})),
        ("batchtopk", BatchTopKTrainingSAE, (BatchTopKTrainingSAEConfig, {"k": k})),
        (
            "matryoshka_batchtopk",
            MatryoshkaBatchTopKTrainingSAE,
            (
                MatryoshkaBatchTopKTrainingSAEConfig,
                {"k": k, "matryoshka_widths": [d_sae // 4, d_sae]},
            ),
        ),
    ]


def train(kind: type, config: tuple[type, dict], x: torch.Tensor, given: dict):
    kinds, settings = config
    hook = f"blocks.{given['layer']}.hook_resid_post"
    known = SAEMetadata(hook_name=hook, model_name=given["model"])
    sae = kind(kinds(d_in=x.shape[1], d_sae=given["d_sae"], metadata=known, **settings))
    with torch.no_grad():
        sae.b_dec.data = x.mean(0)  # far from 0: what is done with it shows
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=3e-4,
            lr_end=3e-5,
        ),
        sae,
        batches(x),
    )
    return trainer.fit()


def batches(x: torch.Tensor) -> Iterator[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    while True:
        yield x[torch.randint(len(x), (BATCH,), generator=source)]


if __name__ == "__main__":
    main()
