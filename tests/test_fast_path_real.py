"""The compiled pass equals transformers on the embedded model itself, in float32 and as served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fortpoint.engine import precision
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Floats, Span, Step
from fortpoint.engine.precision import Wanted
from fortpoint.types import Message, Role
from served import MODEL

pytestmark = pytest.mark.model

TEXT = (
    "The Golden Gate is a strait on the west coast of North America that connects San Francisco "
    "Bay to the Pacific Ocean. def area(r):\n    return 3.14159 * r ** 2\nIn 1937, 18,000 people "
    "walked across on the first day; it cost $35 million.\n\n\tEl puente es rojo. 金门大桥 🌉"
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = ChatTokenizer.load(MODEL)
    asked = tokenizer.chat([Message(Role.USER, "Where is the Golden Gate Bridge, and how long?")])
    return [tokenizer.encode_text(TEXT), list(asked.tokens)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[Floats]:
    reference: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        return [reference(torch.tensor([tokens])).logits[0].numpy() for tokens in prompts]


def logits(wanted: Wanted, prompts: list[list[int]]) -> list[Floats]:
    model = Llama.load(MODEL, precision.choose(wanted), 512, 32 << 20, threads=2)
    found = []
    for tokens in prompts:
        cache = model.new_cache()
        assert cache.reserve(len(tokens))
        step = Step(tokens, [Span(cache, 0, len(tokens))], range(len(tokens)))
        found.append(model.forward(step).logits.copy())
        cache.release()
    model.close()
    return found


def test_embedded_model_in_float32_equals_transformers(
    prompts: list[list[int]], expected: list[Floats]
) -> None:
    for got, wanted in zip(logits("float32", prompts), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-3, rtol=1e-3)
        assert (got.argmax(axis=1) == wanted.argmax(axis=1)).all()


def test_embedded_model_as_served_says_nearly_the_same(
    prompts: list[list[int]], expected: list[Floats]
) -> None:
    """Activations rounded to bytes: logits spread over some 5 are off by less than .3."""
    for got, wanted in zip(logits("auto", prompts), expected, strict=True):
        off = (got - got.mean(axis=1, keepdims=True)) - (
            wanted - wanted.mean(axis=1, keepdims=True)
        )
        assert np.sqrt(np.mean(off**2)) < 0.3
        assert (got.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.9
