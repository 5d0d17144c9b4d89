"""A Llama (or Mistral, Qwen2, Qwen3) of a few thousand random weights, in a folder like a real
model's.

Its tokenizer has a token for each byte and three special tokens; its chat template is
ChatML. It computes in microseconds what the real model computes in milliseconds, along the
same path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from fortpoint.vault.model_folder import write_manifest

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = 258

FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama-biased": {"attention_bias": True, "head_dim": 32, "num_key_value_heads": 1},
    "llama-llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 32},
    "mistral-unlimited": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-biased": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
}
"""Changes to ``config`` for every kind of model that the fast path computes."""


def config(**changes: Any) -> dict[str, Any]:
    model_type = changes.get("model_type", "llama")
    return {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 257,
        "eos_token_id": EOS,
    } | changes


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Biases and norms of queries and keys where the family of ``config`` has them."""
    source = torch.Generator().manual_seed(seed)
    d, d_mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or d // config["num_attention_heads"]
    d_heads, d_kv = (head_dim * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (d,),
            layer + "post_attention_layernorm.weight": (d,),
            layer + "self_attn.q_proj.weight": (d_heads, d),
            layer + "self_attn.k_proj.weight": (d_kv, d),
            layer + "self_attn.v_proj.weight": (d_kv, d),
            layer + "self_attn.o_proj.weight": (d, d_heads),
            layer + "mlp.gate_proj.weight": (d_mlp, d),
            layer + "mlp.up_proj.weight": (d_mlp, d),
            layer + "mlp.down_proj.weight": (d, d_mlp),
        }
        if config["model_type"] == "qwen2" or config.get("attention_bias"):
            shapes |= {
                layer + "self_attn.q_proj.bias": (d_heads,),
                layer + "self_attn.k_proj.bias": (d_kv,),
                layer + "self_attn.v_proj.bias": (d_kv,),
            }
        if config.get("attention_bias"):
            shapes[layer + "self_attn.o_proj.bias"] = (d,)
        if config["model_type"] == "qwen3":
            shapes |= {layer + f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    return {
        name: torch.randn(shape, generator=source) * (0.2 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }


def make(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = config(**changes)
    (folder / "config.json").write_text(json.dumps(made))
    save_file(weights(made, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return finish(folder)


def finish(folder: Path) -> Path:
    """Give the model in ``folder`` its tokenizer and manifest."""
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    )
    write_manifest(folder, folder.name, "tests/tiny_model.py", "Apache-2.0", 1_700_000_000)
    return folder


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer
