"""LoRA adapters of random numbers, in a folder as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fortpoint.engine.architecture import Architecture, module_path

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "megatron_core": "megatron.core",
        "r": 4,
        "target_modules": list(ALL),
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    } | changes


def tensor_name(layer: int, module: str, side: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module_path(module)}.lora_{side}.weight"


def tensors(
    architecture: Architecture,
    modules: Iterable[str] = ALL,
    ranks: Mapping[tuple[int, str], int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """``ranks`` has those that are not 4, by layer and module."""
    source, made = torch.Generator().manual_seed(seed), {}
    for layer in range(architecture.n_layers):
        for module in modules:
            d_out, d_in = architecture.projections[module]
            rank = (ranks or {}).get((layer, module), 4)
            for side, shape in {"A": (rank, d_in), "B": (d_out, rank)}.items():
                made[tensor_name(layer, module, side)] = torch.randn(shape, generator=source) * 0.1
    return made


def write(folder: Path, made: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)))
    save_file(made, folder / "adapter_model.safetensors")
    return folder
