"""What a configuration says is what transformers understands by it, or it is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny_model
from fortpoint.engine.architecture import Architecture, lacking, read_config
from fortpoint.engine.rotary import Rotary
from fortpoint.errors import ModelError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    LLAMA3,
    LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
    YARN,
    YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    YARN | {"attention_factor": 0.75},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    YARN | {"factor": 0.5},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
]


def _architecture(folder: Path, **changes: Any) -> Architecture:
    (folder / "config.json").write_text(json.dumps(tiny_model.config(**changes)))
    return Architecture.load(folder)


@pytest.mark.parametrize("parameters", ROPES, ids=lambda p: p["rope_type"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotary_of_each_kind_equals_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    theirs = AutoConfig.for_model(
        "llama", hidden_size=256, head_dim=head_dim, max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10_000.0} | parameters,
    )  # fmt: skip
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu")
    found = Rotary.of(parameters, head_dim, 4096)
    np.testing.assert_allclose(found.inv_freq, expected.numpy(), rtol=2e-6)
    assert math.isclose(found.scale, scale, rel_tol=1e-9)


def test_rotary_by_default_is_the_paper_s() -> None:
    found = Rotary.of({"rope_theta": 100.0}, 4, 16)
    np.testing.assert_allclose(found.inv_freq, [1.0, 0.1], rtol=1e-6)
    assert found.scale == 1.0


@pytest.mark.parametrize("kind", tiny_model.FAMILY)
def test_architecture_of_the_family_equals_transformers(tmp_path: Path, kind: str) -> None:
    found = _architecture(tmp_path, **tiny_model.FAMILY[kind])
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert found.head_dim == getattr(theirs, "head_dim", 16)
    assert found.n_kv_heads == theirs.num_key_value_heads
    assert found.tied == theirs.tie_word_embeddings
    assert found.norm_eps == theirs.rms_norm_eps
    assert found.score_scale == pytest.approx(found.head_dim**-0.5)


def test_architecture_names_every_tensor_of_the_checkpoint(tmp_path: Path) -> None:
    for kind, changes in tiny_model.FAMILY.items():
        weights = tiny_model.weights(tiny_model.config(**changes))
        wanted = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        assert _architecture(tmp_path, **changes).shapes() == wanted, kind


def test_architecture_has_the_windows_of_each_family(tmp_path: Path) -> None:
    def windows(**changes: Any) -> tuple[int, ...]:
        return _architecture(tmp_path, **changes).windows

    assert windows(sliding_window=5) == (0, 0, 0)
    assert windows(model_type="mistral") == (4096,) * 3
    assert windows(model_type="mistral", sliding_window=None) == (0, 0, 0)
    qwen = {"model_type": "qwen3", "head_dim": 16, "sliding_window": 5}
    assert windows(**qwen, max_window_layers=1) == (0, 0, 0)
    assert windows(**qwen, max_window_layers=1, use_sliding_window=True) == (0, 5, 5)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(**qwen, layer_types=types, use_sliding_window=True) == (5, 0, 5)


def test_rope_is_read_in_both_spellings(tmp_path: Path) -> None:
    old = _architecture(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = _architecture(
        tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    )
    np.testing.assert_array_equal(old.inv_freq, new.inv_freq)
    np.testing.assert_array_equal(
        _architecture(tmp_path, rope_theta=5e5).inv_freq, old.inv_freq * 2
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not of the Llama family"),
        ({"model_type": "a" * 10_000}, "is not of the Llama family"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"mlp_bias": True}, "MLP has biases"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "kind 'dynamic'"),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "kind"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_size": 72}, "hidden_size is 72"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "head_dim is 8"),
        ({"head_dim": 24}, "head_dim is 24"),
    ],
)
def test_architecture_that_the_fast_path_lacks_says_what(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        _architecture(tmp_path, **changes)
    assert lacking(read_config(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": -1},
        {"vocab_size": 1e3},
        {"vocab_size": True},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"hidden_size": 1 << 30},
        {"num_attention_heads": 0},
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"rms_norm_eps": 0.0},
        {"rope_theta": 1e300},
        {"rope_theta": -1.0},
        {"rope_parameters": [1]},
        {"rope_parameters": "linear"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
        {"max_position_embeddings": 0},
        {"model_type": "mistral", "sliding_window": 0},
        {"model_type": "qwen2", "layer_types": ["full_attention"]},
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
    ],
    ids=str,
)
def test_architecture_out_of_range_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        _architecture(tmp_path, **changes)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b'{"vocab_size": NaN}', b"[" * 100_000, b" " * (1 << 21)]
)
def test_config_that_is_no_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"config\.json"):
        Architecture.load(tmp_path)


def test_config_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        Architecture.load(tmp_path)


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "max_position_embeddings"])
def test_config_without_a_size_is_refused(tmp_path: Path, missing: str) -> None:
    config = tiny_model.config()
    del config[missing]
    with pytest.raises(ModelError, match=missing):
        Architecture.of(config)
