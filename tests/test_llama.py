"""The forward pass equals an independent implementation, however its rows are cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_model
from fortpoint.engine import precision
from fortpoint.engine.kv_cache import KVBudget
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Span
from fortpoint.errors import ModelError

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": 1, "rope_theta": 100000.0},
]


def _load(folder: Path) -> Llama:
    return Llama.load(folder, precision.plain("float32"), 512)


@pytest.mark.parametrize("changes", SHAPES)
@torch.inference_mode()
def test_forward_on_random_weights_equals_transformers(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = _load(tiny_model.make(tmp_path / "tiny", **changes))
    config = tiny_model.config(**changes)
    reference = LlamaForCausalLM(LlamaConfig(**config)).eval()
    reference.load_state_dict(tiny_model.weights(config), strict=False)
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens[None], output_hidden_states=True)

    seen: dict[int, torch.Tensor] = {}
    cache = model.cache(KVBudget(512))
    assert cache.reserve(40)
    x = model.forward(tokens.tolist(), [Span(cache, 0, 40)], lambda i, x: seen.update({i: x}))

    torch.testing.assert_close(model.logits(x), expected.logits[0], atol=2e-4, rtol=1e-3)
    for layer in (0, 1):  # transformers' last hidden state is after the final norm
        torch.testing.assert_close(
            seen[layer], expected.hidden_states[layer + 1][0], atol=2e-4, rtol=1e-3
        )


@torch.inference_mode()
def test_forward_in_chunks_beside_another_sequence_equals_forward_at_once(tmp_path: Path) -> None:
    model = _load(tiny_model.make(tmp_path / "tiny"))
    budget = KVBudget(1024)
    tokens, other = list(range(30)), list(range(100, 130))
    alone, chunked, neighbour = (model.cache(budget) for _ in range(3))
    for cache in (alone, chunked, neighbour):
        assert cache.reserve(60)
    expected = model.forward(tokens, [Span(alone, 0, 30)])

    first = model.forward([*other, *tokens[:11]], [Span(neighbour, 0, 30), Span(chunked, 30, 41)])
    second = model.forward([7, *tokens[11:]], [Span(neighbour, 0, 1), Span(chunked, 1, 20)])

    got = torch.cat([first[30:], second[1:]])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_forward_until_layer_stops_after_it(tmp_path: Path) -> None:
    model = _load(tiny_model.make(tmp_path / "tiny"))
    seen: list[int] = []
    cache = model.cache(KVBudget(128))
    assert cache.reserve(3)
    model.forward([1, 2, 3], [Span(cache, 0, 3)], lambda i, _: seen.append(i), until_layer=1)
    assert seen == [0, 1]


def test_load_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "tiny", model_type="gpt2")
    with pytest.raises(ModelError, match="architecture 'gpt2'"):
        _load(folder)


def test_load_of_damaged_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        _load(folder)


@torch.inference_mode()
def test_cache_beyond_the_budget_is_refused_and_given_back(tmp_path: Path) -> None:
    model = _load(tiny_model.make(tmp_path / "tiny"))
    budget = KVBudget(256)
    first, second = model.cache(budget), model.cache(budget)
    assert first.reserve(200)
    assert not second.reserve(1)
    first.release()
    assert second.reserve(1)
    assert budget.free == 192
