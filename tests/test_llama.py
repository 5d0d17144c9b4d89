"""What a row gets does not depend on its neighbours, its chunks, or how weights are held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_model
from fortpoint.engine import precision
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Floats, Span, Step
from fortpoint.errors import ModelError

KINDS = ("float32", "bfloat16", "int8", "int4")
TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 256, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module", params=KINDS)
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[Llama]:
    made = load(folder, request.param, threads=2)
    yield made
    made.close()


def load(folder: Path, kind: str, threads: int = 1) -> Llama:
    return Llama.load(
        folder, precision.choose(kind), max_context=512, kv_bytes=1 << 22, threads=threads
    )


def logits(model: Llama, tokens: list[int], chunks: list[int]) -> Floats:
    """Of all tokens, computed in chunks of these lengths and one for the rest."""
    cache, rows, start = model.new_cache(), [], 0
    assert cache.reserve(len(tokens))
    for length in (*chunks, len(tokens)):
        chunk = tokens[start : start + length]
        if chunk:
            step = Step(chunk, [Span(cache, 0, len(chunk))], range(len(chunk)))
            rows.append(model.forward(step).logits.copy())
        start += len(chunk)
    cache.release()
    return np.concatenate(rows)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chunks=st.lists(st.integers(1, 40), max_size=8))
def test_forward_in_chunks_gives_the_same_bits(model: Llama, chunks: list[int]) -> None:
    at_once = logits(model, TOKENS, [])
    assert np.array_equal(logits(model, TOKENS, chunks), at_once)


@pytest.mark.parametrize("n_neighbours", [1, 2, 6, 13])
def test_forward_beside_neighbours_gives_the_same_bits(model: Llama, n_neighbours: int) -> None:
    alone = logits(model, TOKENS, [])
    caches = [model.new_cache() for _ in range(n_neighbours + 1)]
    for number, cache in enumerate(caches):
        assert cache.reserve(100)
        own = TOKENS[:40] if cache is caches[-1] else TOKENS[number : number + 5 * number + 1]
        model.forward(Step(own, [Span(cache, 0, len(own))]))
    for token, expected in zip(TOKENS[40:], alone[40:], strict=True):
        spans = [Span(cache, i, i + 1) for i, cache in enumerate(caches)]
        tokens = [*range(n_neighbours), token]
        result = model.forward(Step(tokens, spans, [n_neighbours]))
        assert np.array_equal(result.logits[0], expected)
    for cache in caches:
        cache.release()


def test_forward_with_one_thread_gives_the_same_bits_as_with_two(folder: Path) -> None:
    one, two = load(folder, "int4", 1), load(folder, "int4", 2)
    assert np.array_equal(logits(one, TOKENS, []), logits(two, TOKENS, [9]))
    two.close()


def test_forward_keeps_the_layers_that_are_tapped(model: Llama) -> None:
    cache = model.new_cache()
    assert cache.reserve(4)
    result = model.forward(Step(TOKENS[:4], [Span(cache, 0, 4)], tap_layers=(0, 2)))
    assert set(result.seen) == {0, 2}
    assert np.array_equal(result.seen[2], result.residual)
    cache.release()


def test_forward_to_a_layer_stops_after_it(model: Llama) -> None:
    whole, part = model.new_cache(), model.new_cache()
    for cache in (whole, part):
        assert cache.reserve(4)
    all_layers = model.forward(Step(TOKENS[:4], [Span(whole, 0, 4)], tap_layers=(1,)))
    expected = all_layers.seen[1].copy()
    result = model.forward(Step(TOKENS[:4], [Span(part, 0, 4)], last_layer=1))
    assert np.array_equal(result.residual, expected)
    whole.release()
    part.release()


def test_forward_without_room_is_refused_before_anything_is_computed(model: Llama) -> None:
    cache = model.new_cache()
    assert cache.reserve(32)
    with pytest.raises(ValueError, match="no room"):
        model.forward(Step(TOKENS[:40], [Span(cache, 0, 40)]))
    assert cache.length == 0
    cache.release()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": [1, 259]},  # of a tokenizer that has more tokens than the embedding has rows
        {"tokens": [1, -1]},
        {"logit_rows": [2]},
        {"logit_rows": [-1]},
        {"tap_layers": (3,)},
        {"last_layer": 3},
    ],
)
def test_forward_of_what_the_model_does_not_have_is_refused_before_memory_is_read(
    model: Llama, wrong: dict[str, Any]
) -> None:
    cache = model.new_cache()
    assert cache.reserve(2)
    step = Step(**({"tokens": [1, 2], "spans": [Span(cache, 0, 2)]} | wrong))
    with pytest.raises(ValueError, match="does not have"):
        model.forward(step)
    assert cache.length == 0
    cache.release()


def test_forward_with_rows_that_are_nobodys_is_refused(model: Llama) -> None:
    cache = model.new_cache()
    assert cache.reserve(4)
    for spans in ([Span(cache, 0, 1)], [Span(cache, 1, 2)], [Span(cache, 0, 3)]):
        with pytest.raises(ValueError, match="does not have"):
            model.forward(Step([1, 2], spans))
    cache.release()


def test_forward_beyond_the_longest_context_is_refused(model: Llama) -> None:
    cache = model.new_cache()
    assert cache.reserve(model.max_context + 32)
    cache.length = model.max_context
    with pytest.raises(ValueError, match="no room"):
        model.forward(Step([1], [Span(cache, 0, 1)]))
    cache.release()


def test_normed_is_what_the_output_matrix_gets(folder: Path) -> None:
    model = load(folder, "float32")
    cache = model.new_cache()
    assert cache.reserve(3)
    result = model.forward(Step(TOKENS[:3], [Span(cache, 0, 3)], range(3)))
    embedding = tiny_model.weights(tiny_model.config())["model.embed_tokens.weight"].numpy()
    np.testing.assert_allclose(
        model.normed(result.residual) @ embedding.T, result.logits, atol=1e-4, rtol=1e-4
    )


def test_precision_says_how_matrices_are_held(folder: Path) -> None:
    assert load(folder, "int4").precision == "int4 and int8"
    assert load(folder, "float32").precision == "float32"


def test_load_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "tiny", model_type="gpt2")
    with pytest.raises(ModelError, match="gpt2"):
        load(folder, "float32")


def test_load_of_damaged_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(folder, "float32")
