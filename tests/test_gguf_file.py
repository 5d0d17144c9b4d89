"""GGUF files written by the ``gguf`` package come back as the checkpoint they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from safetensors.torch import load_file

import tiny_model
from fortpoint.engine import precision
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Span, Step
from fortpoint.errors import ModelError
from fortpoint.types import Message, Role
from fortpoint.vault import gguf_file

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
NAMES = {checkpoint: gguf for gguf, checkpoint in gguf_file._BLOCK.items()}


def _interleave(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """As llama.cpp's own converter stores rotary rows: (head, half, pair) to (head, pair, half)."""
    rows, d_in = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, d_in).swapaxes(1, 2).reshape(rows, d_in)


def _write(path: Path, kind: GGMLQuantizationType, **changes: Any) -> dict[str, torch.Tensor]:
    config = tiny_model.config(**SHAPE)
    weights = tiny_model.weights(config)
    writer = GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    vocabulary = tiny_model._tokenizer().get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 3)
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_chat_template(tiny_model.TEMPLATE)
    for name, weight in weights.items():
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            array = _interleave(array, config[heads])
        is_matrix = array.ndim == 2
        data = quants.quantize(array, kind) if is_matrix else array
        writer.add_tensor(_gguf_name(name), data, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, *rest = stem.split(".")
        return f"blk.{layer}.{NAMES['.'.join(rest)]}.weight"
    tops = {checkpoint: gguf for gguf, checkpoint in gguf_file._TOP.items()}
    return f"{tops[stem]}.weight"


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (GGMLQuantizationType.F32, 1e-3),
        (GGMLQuantizationType.Q8_0, 0.01),
        (GGMLQuantizationType.Q4_1, 0.06),
    ],
)
def test_convert_gives_back_the_checkpoint(
    tmp_path: Path, kind: GGMLQuantizationType, tolerance: float
) -> None:
    expected = _write(tmp_path / "tiny.gguf", kind)
    seen: list[tuple[int, int]] = []
    gguf_file.convert(tmp_path / "tiny.gguf", tmp_path, lambda *done: seen.append(done))
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name].float(), weight, atol=tolerance, rtol=1e-3)
    assert seen[-1] == (len(expected), len(expected))


def test_converted_model_runs(tmp_path: Path) -> None:
    _write(tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    gguf_file.convert(tmp_path / "tiny.gguf", tmp_path, lambda *_: None)
    model = Llama.load(tmp_path, precision.plain("float32"), 128, kv_bytes=1 << 20, threads=1)
    tokens = ChatTokenizer.load(tmp_path).chat([Message(Role.USER, "hello")]).tokens
    cache = model.new_cache()
    assert cache.reserve(len(tokens))
    step = Step(tokens, [Span(cache, 0, len(tokens))], logit_rows=[len(tokens) - 1])
    assert np.isfinite(model.forward(step).logits).all()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"architecture": "mamba"}, "architecture"), ({"pre": "tekken"}, "tokenizer 'tekken'")],
)
def test_convert_of_what_is_not_known_is_refused(
    tmp_path: Path, changes: dict[str, str], complaint: str
) -> None:
    _write(tmp_path / "tiny.gguf", GGMLQuantizationType.F32, **changes)
    with pytest.raises(ModelError, match=complaint):
        gguf_file.convert(tmp_path / "tiny.gguf", tmp_path, lambda *_: None)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_convert_of_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        gguf_file.convert(tmp_path / "bad.gguf", tmp_path, lambda *_: None)
