"""Something to read with: a random dictionary and random probes, as costly as trained ones.

    python random_taps.py MODEL_FOLDER TARGET_FOLDER

    TARGET/features/random/cfg.json, sae_weights.safetensors, feature_stats.safetensors
    TARGET/probes.json, probes.safetensors

The dictionary's threshold is set on the model's own residual stream, so that of 4,608 features
about 40 are active at a token. In a process of its own: the client that measures stays small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

N_FEATURES = 4608
N_ACTIVE = 40
N_PROBES = 10
LAYER = 15
PROBE_LAYERS = (9, 12, 15, 18, 21, 24)
DICTIONARY = "random"
_TEXTS = Path(__file__).with_name("prompts.txt")


def main() -> None:
    model, target = Path(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    x = residuals(model)
    write_dictionary(x, target / "features" / DICTIONARY)
    write_probes(x.shape[1], model.name, target / "probes")


@torch.inference_mode()
def residuals(folder: Path) -> Tensor:
    """``[n_tokens, d_model]`` after block ``LAYER``, each text's first token (a sink) left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    seen = []
    for text in _TEXTS.read_text(encoding="utf-8").splitlines():
        tokens = torch.tensor([tokenizer.encode(text).ids])
        hidden = model(tokens, output_hidden_states=True).hidden_states[LAYER + 1][0]
        seen.append(hidden[1:])
    return torch.cat(seen)


def write_dictionary(x: Tensor, folder: Path) -> None:
    """A JumpReLU dictionary in SAELens' format."""
    folder.mkdir(parents=True)
    d_in = x.shape[1]
    decoder = torch.nn.functional.normalize(torch.randn(N_FEATURES, d_in), dim=-1)
    center = x.mean(0)
    z = (x - center) @ decoder.T
    threshold = z.flatten().sort().values[-N_ACTIVE * len(x)]
    tensors = {
        "W_enc": decoder.T.contiguous(),
        "W_dec": decoder,
        "b_enc": torch.zeros(N_FEATURES),
        "b_dec": center,
        "threshold": threshold.repeat(N_FEATURES),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    maxima = {"max_activations": z.max(0).values.clamp_min(1.0)}
    save_file(maxima, folder / "feature_stats.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": N_FEATURES,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{LAYER}.hook_resid_post", "sae_lens_version": "6.54.0"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def write_probes(d_model: int, model: str, stem: Path) -> None:
    """Probes over as many layers as the shipped ones read."""
    weights = {
        "W": torch.randn(len(PROBE_LAYERS), N_PROBES, d_model) * 0.1,
        "b": torch.zeros(N_PROBES),
    }
    save_file(weights, stem.with_suffix(".safetensors"))
    card = {
        "model": model,
        "hook": "resid_post",
        "normalise": "rms",
        "probes": [f"probe-{number}" for number in range(N_PROBES)],
        "layers": PROBE_LAYERS,
    }
    stem.with_suffix(".json").write_text(json.dumps(card))


if __name__ == "__main__":
    main()
