"""GGUF in, Hugging Face's layout out: config, tokenizer and dequantised safetensors.

llama.cpp stores the rows of ``attn_q`` and ``attn_k`` interleaved for its own rotary
embedding; they are put back into the order that checkpoints use. Weights are written as
float16: a Q4_1 weight is ``q * scale + minimum`` with float16 scale and minimum, so what is
lost (2^-11 relative) is far below the quantisation step.

Not protected here: the parser is the ``gguf`` package's. Files from anywhere but the pinned
catalogue are the operator's own risk until admission (`fortpoint vault import`) exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from fortpoint.errors import ModelError

Array = npt.NDArray[Any]

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_CONTROL_TOKEN = 3


def convert(source: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Write ``config.json``, the tokenizer and ``model.safetensors`` into ``target``.

    ``progress(done, total)`` is called for each tensor. Raises ``ModelError`` for a file that
    is no GGUF or of an architecture other than Llama's.
    """
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ModelError(f"{source.name} is not a GGUF file that can be read: {error}") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ModelError(
            f"{source.name} has architecture {fields.get('general.architecture')!r}; "
            "only 'llama' can be converted so far"
        )
    try:
        config = _config(fields)
        _write_json(target / "config.json", config)
        _write_tokenizer(fields, target)
        _write_weights(reader, config, target / "model.safetensors", progress)
    except KeyError as error:
        raise ModelError(f"{source.name} lacks {error.args[0]!r}") from None


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    n_heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", n_heads),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "dtype": "float16",
    }


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    pre = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(f"the tokenizer {pre!r} of this GGUF file cannot be converted so far")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "chat_template": fields["tokenizer.chat_template"],
            "model_max_length": fields["llama.context_length"],
        },
    )


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _gpt2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _llama_bpe_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS = {
    "smollm": _smollm_pre_tokenizer,
    "gpt-2": _gpt2_pre_tokenizer,
    "llama-bpe": _llama_bpe_pre_tokenizer,
}


def _write_weights(
    reader: GGUFReader, config: dict[str, Any], file: Path, progress: Callable[[int, int], None]
) -> None:
    n_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, Array] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        name, kind = checkpoint_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        if kind in n_heads:
            weight = deinterleave(weight, n_heads[kind])
        weights[name] = np.ascontiguousarray(weight)
        progress(done, len(reader.tensors))
    if "lm_head.weight" in weights:
        config["tie_word_embeddings"] = False
        _write_json(file.parent / "config.json", config)
    save_file(weights, file, metadata={"format": "pt"})


def checkpoint_name(name: str) -> tuple[str, str]:
    """GGUF's tensor name in checkpoint form, and its kind (``attn_q``)."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}", stem
    prefix, _, rest = stem.partition(".")
    layer, _, kind = rest.partition(".")
    if prefix != "blk" or kind not in _BLOCK or suffix != "weight":
        raise ModelError(f"unknown tensor {name!r}")
    return f"model.layers.{int(layer)}.{_BLOCK[kind]}.{suffix}", kind


def deinterleave(weight: Array, n_heads: int) -> Array:
    """Undo llama.cpp's rotary order: rows (head, pair, half) back to (head, half, pair)."""
    rows, d_in = weight.shape
    pairs = rows // n_heads // 2
    return weight.reshape(n_heads, pairs, 2, d_in).swapaxes(1, 2).reshape(rows, d_in)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
