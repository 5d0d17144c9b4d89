"""An adapter adds to the model what PEFT would add, or it is left out with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peft_adapter
import tiny_model
from fortpoint.engine import lora
from fortpoint.engine.architecture import Architecture
from fortpoint.engine.lora import Adapters
from fortpoint.errors import ModelError

ARCHITECTURE = Architecture.of(tiny_model.config())


def _delta(adapter: lora.LoraAdapter, layer: int, module: str) -> np.ndarray:
    pair = adapter.layers[layer][module]
    return pair.B @ pair.A


def _expected(made: dict[str, torch.Tensor], layer: int, module: str, scale: float) -> np.ndarray:
    inner, outer = (made[peft_adapter.tensor_name(layer, module, side)] for side in "AB")
    return (scale * (outer @ inner)).numpy()


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 6 / 4), ({"use_rslora": True}, 6 / 2), ({"lora_alpha": 2}, 2 / 4)],
)
def test_adapter_adds_its_scaled_product(
    tmp_path: Path, changes: dict[str, Any], scale: float
) -> None:
    made = peft_adapter.tensors(ARCHITECTURE)
    peft_adapter.write(tmp_path / "mine", made, **changes)
    adapters = Adapters.load(tmp_path, ARCHITECTURE)
    assert list(adapters) == ["mine"]
    assert adapters.left_out == {}
    for layer in range(3):
        assert set(adapters["mine"].layers[layer]) == set(peft_adapter.ALL)
        for module in peft_adapter.ALL:
            expected = _expected(made, layer, module, scale)
            np.testing.assert_allclose(
                _delta(adapters["mine"], layer, module), expected, rtol=1e-4, atol=1e-6
            )


def test_adapter_with_patterns_has_ranks_and_scales_of_its_own(tmp_path: Path) -> None:
    ranks = {(layer, "v_proj"): 2 for layer in range(3)} | {(1, "q_proj"): 8}
    made = peft_adapter.tensors(ARCHITECTURE, ("q_proj", "v_proj"), ranks)
    folder = peft_adapter.write(
        tmp_path / "mine",
        made,
        rank_pattern={"v_proj": 2, "^model.layers.1.self_attn.q_proj": 8},
        alpha_pattern={"layers.1.self_attn.q_proj": 1.0},
    )
    adapter = lora.load(folder, ARCHITECTURE)
    scales = {(0, "v_proj"): 6 / 2, (0, "q_proj"): 6 / 4, (1, "q_proj"): 1 / 8}
    for (layer, module), scale in scales.items():
        np.testing.assert_allclose(
            _delta(adapter, layer, module), _expected(made, layer, module, scale), rtol=1e-4,
            atol=1e-6,
        )  # fmt: skip


def test_adapter_of_some_modules_leaves_the_others(tmp_path: Path) -> None:
    made = peft_adapter.tensors(ARCHITECTURE, ("q_proj",))
    made = {name: tensor for name, tensor in made.items() if ".1." in name}
    adapter = lora.load(peft_adapter.write(tmp_path / "mine", made), ARCHITECTURE)
    assert [sorted(layer) for layer in adapter.layers] == [[], ["q_proj"], []]
    assert adapter.n_bytes == 4 * (4 * 64 + 64 * 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3'"),
        ({"use_dora": True}, "uses 'use_dora'"),
        ({"modules_to_save": ["lm_head"]}, "uses 'modules_to_save'"),
        ({"lora_bias": True}, "uses 'lora_bias'"),
        ({"bias": "all"}, "trains biases"),
        ({"layer_replication": [[0, 2]]}, "uses 'layer_replication'"),
        ({"trainable_token_indices": [1]}, "uses 'trainable_token_indices'"),
        ({"some_later_option": 1}, "uses 'some_later_option'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"r": 257}, "cannot be used"),
        ({"r": 0}, "cannot be used"),
        ({"lora_alpha": "6"}, "cannot be used"),
        ({"lora_alpha": 1e30}, "cannot be used"),
        ({"rank_pattern": {"(a+)+$": 4}}, "the pattern"),
        ({"r": 8}, "has the shape"),
        ({"base_model_digest": "sha256:other"}, "for another model"),
    ],
    ids=str,
)
def test_adapter_that_is_not_understood_is_left_out(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    peft_adapter.write(tmp_path / "good", peft_adapter.tensors(ARCHITECTURE))
    peft_adapter.write(tmp_path / "odd", peft_adapter.tensors(ARCHITECTURE), **changes)
    adapters = Adapters.load(tmp_path, ARCHITECTURE, "sha256:this")
    assert list(adapters) == ["good"]
    assert reason in adapters.left_out["odd"]


def test_adapter_of_this_very_model_is_taken(tmp_path: Path) -> None:
    made = peft_adapter.tensors(ARCHITECTURE)
    folder = peft_adapter.write(tmp_path / "mine", made, base_model_digest="sha256:this")
    assert lora.load(folder, ARCHITECTURE, "sha256:this").name == "mine"


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 128}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4}], ids=str
)
def test_adapter_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    other = Architecture.of(tiny_model.config(**changes))
    folder = peft_adapter.write(tmp_path / "mine", peft_adapter.tensors(other))
    with pytest.raises(ModelError, match=r"has the shape|has a layer 3"):
        lora.load(folder, ARCHITECTURE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.lm_head.lora_A.weight", "not understood"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "not understood"),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", "not understood"),
        ("base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight", "not understood"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "a layer 9"),
        (peft_adapter.tensor_name(2, "up_proj", "A"), "only one of its two"),
    ],
)
def test_adapter_with_another_tensor_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    made = peft_adapter.tensors(ARCHITECTURE, ("q_proj",)) | {name: torch.ones(4, 64)}
    folder = peft_adapter.write(tmp_path / "mine", made)
    with pytest.raises(ModelError, match=reason):
        lora.load(folder, ARCHITECTURE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_adapter_with_values_that_are_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    made = peft_adapter.tensors(ARCHITECTURE, ("q_proj",))
    made[peft_adapter.tensor_name(1, "q_proj", "B")][3, 2] = value
    folder = peft_adapter.write(tmp_path / "mine", made)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        lora.load(folder, ARCHITECTURE)


def test_adapters_that_are_damaged_are_left_out_each_with_its_reason(tmp_path: Path) -> None:
    made = peft_adapter.tensors(ARCHITECTURE)
    (peft_adapter.write(tmp_path / "a-no-weights", made) / lora.WEIGHTS).unlink()
    (peft_adapter.write(tmp_path / "b-no-config", made) / lora.CONFIG).unlink()
    (peft_adapter.write(tmp_path / "c-cut", made) / lora.WEIGHTS).write_bytes(b"\0" * 7)
    (peft_adapter.write(tmp_path / "d-junk", made) / lora.CONFIG).write_bytes(b"\xff")
    (peft_adapter.write(tmp_path / "e-nested", made) / lora.CONFIG).write_bytes(b"[" * 99_999)
    peft_adapter.write(tmp_path / "f-empty", {})
    peft_adapter.write(tmp_path / "g name", made)
    (tmp_path / "a file").write_text("is passed over")
    adapters = Adapters.load(tmp_path, ARCHITECTURE)
    assert dict(adapters) == {}
    assert [reason[:12] for reason in adapters.left_out.values()] == [
        "it has no ad", "adapter_conf", "adapter_mode", "adapter_conf", "adapter_conf",
        "it adds noth", "its name is ",
    ]  # fmt: skip


def test_adapter_as_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / lora.CONFIG).write_text(json.dumps(peft_adapter.config()))
    (folder / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="other formats are not read"):
        lora.load(folder, ARCHITECTURE)


def test_adapter_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = peft_adapter.write(tmp_path / "mine", peft_adapter.tensors(ARCHITECTURE))
    monkeypatch.setattr(lora, "MAX_BYTES", 1000)
    with pytest.raises(ModelError, match="larger than 1000 bytes"):
        lora.load(folder, ARCHITECTURE)


def test_more_adapters_than_the_limit_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MAX_ADAPTERS", 1)
    for name in ("a", "b"):
        peft_adapter.write(tmp_path / name, peft_adapter.tensors(ARCHITECTURE))
    adapters = Adapters.load(tmp_path, ARCHITECTURE)
    assert (list(adapters), list(adapters.left_out)) == (["a"], ["b"])


def test_adapters_of_a_folder_that_is_absent_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="folder cannot be read"):
        Adapters.load(tmp_path / "nowhere", ARCHITECTURE)
