"""The reference is right: it equals transformers, however its rows are cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_model
from fortpoint.engine.model import Model, Span, Step
from reference_model import ReferenceModel


def test_reference_on_random_weights_equals_transformers() -> None:
    model = ReferenceModel()
    config = tiny_model.config()
    reference = LlamaForCausalLM(LlamaConfig(**config)).eval()
    reference.load_state_dict(tiny_model.weights(config), strict=False)
    tokens = list(range(7, 47))
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens]), output_hidden_states=True)
    cache = model.new_cache()
    assert cache.reserve(40)
    got = model.forward(Step(tokens, [Span(cache, 0, 40)], range(40), (0, 1)))

    np.testing.assert_allclose(got.logits, expected.logits[0], atol=2e-4, rtol=1e-3)
    for layer in (0, 1):
        hidden = expected.hidden_states[layer + 1][0]
        np.testing.assert_allclose(got.seen[layer], hidden, atol=2e-4, rtol=1e-3)


def test_reference_is_a_model_and_its_rows_are_alone() -> None:
    model = ReferenceModel()
    assert isinstance(model, Model)
    alone, chunked, other = (model.new_cache() for _ in range(3))
    assert all(cache.reserve(40) for cache in (alone, chunked, other))
    tokens = list(range(30))
    whole = model.forward(Step(tokens, [Span(alone, 0, 30)], [29])).logits
    model.forward(Step([9, *tokens[:11]], [Span(other, 0, 1), Span(chunked, 1, 12)]))
    parts = model.forward(Step(tokens[11:], [Span(chunked, 0, 19)], [18])).logits

    np.testing.assert_array_equal(whole, parts)


def test_reference_adopts_what_was_published_with_the_same_salt() -> None:
    model = ReferenceModel()
    first, second = model.new_cache(), model.new_cache()
    assert first.reserve(20)
    model.forward(Step(list(range(20)), [Span(first, 0, 20)]))
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    first.publish(list(range(20)), "a", rows)

    assert second.adopt(list(range(20)), "b") is None
    adopted = second.adopt(list(range(20)), "a")
    assert second.length == 19
    np.testing.assert_array_equal(adopted, rows[:19])
    assert second.reserve(20)
    last = model.forward(Step([19], [Span(second, 0, 1)], [0])).logits
    third = model.new_cache()
    assert third.reserve(20)
    whole = model.forward(Step(list(range(20)), [Span(third, 0, 20)], [19])).logits
    np.testing.assert_array_equal(last, whole)


@pytest.mark.parametrize("n_tokens", [10, 64])
def test_reference_without_memory_refuses(n_tokens: int) -> None:
    cache = ReferenceModel(n_tokens).new_cache()
    assert cache.reserve(n_tokens) == (n_tokens >= 16)
    assert not cache.reserve(n_tokens + 17)
