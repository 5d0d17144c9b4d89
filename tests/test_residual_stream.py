"""The stream read and replaced is the one that the forward pass has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import tiny_model
from fortpoint.engine import precision
from fortpoint.engine.llama import Llama
from fortpoint.engine.model import Span, Step
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.engine.transformers_model import TransformersModel
from fortpoint.errors import InvalidRequest

TEXTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 256, length)]
    for length in (1, 7, 40, 3, 55, 60)
]


@pytest.fixture(scope="module", params=["compiled", "transformers"])
def stream(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ResidualStream]:
    folder = tiny_model.make(tmp_path_factory.mktemp("stream") / "tiny")
    model: Llama | TransformersModel
    if request.param == "compiled":
        model = Llama.load(
            folder, precision.choose("float32"), max_context=128, kv_bytes=1 << 22, threads=1
        )
    else:
        model = TransformersModel.load(folder, "float32", 128, 1 << 22, 1)
    yield ResidualStream(model, max_rows=64)
    model.close()


def test_read_is_what_one_pass_over_one_text_sees(stream: ResidualStream) -> None:
    read = stream.read(TEXTS, (2, 0))
    start = 0
    for tokens in TEXTS:
        cache = stream._model.new_cache()
        assert cache.reserve(len(tokens))
        step = Step(tokens, [Span(cache, 0, len(tokens))], tap_layers=(0, 2))
        seen = stream._model.forward(step).seen
        for layer in (0, 2):
            np.testing.assert_allclose(
                read[layer][start : start + len(tokens)], seen[layer], rtol=1e-4, atol=1e-5
            )
        cache.release()
        start += len(tokens)
    assert start == len(read[0])


def test_losses_are_the_likelihoods_of_the_next_tokens(stream: ResidualStream) -> None:
    losses = stream.losses(TEXTS)
    assert len(losses) == sum(len(tokens) - 1 for tokens in TEXTS)
    tokens = TEXTS[2]
    cache = stream._model.new_cache()
    assert cache.reserve(len(tokens))
    step = Step(tokens, [Span(cache, 0, len(tokens))], range(len(tokens)))
    logits = stream._model.forward(step).logits.astype(np.float64)
    cache.release()
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -logs[np.arange(len(tokens) - 1), tokens[1:]]
    start = sum(len(text) - 1 for text in TEXTS[:2])
    np.testing.assert_allclose(losses[start : start + len(expected)], expected, rtol=1e-4)


def test_replacing_by_the_same_changes_nothing(stream: ResidualStream) -> None:
    same = stream.losses(TEXTS, layer=1, replace=lambda x, positions: x.copy())
    np.testing.assert_allclose(same, stream.losses(TEXTS), rtol=1e-5)


def test_replacing_sees_each_texts_positions_and_changes_what_follows(
    stream: ResidualStream,
) -> None:
    seen: list[int] = []

    def zeroed(x: np.ndarray, positions: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        seen.extend(positions.tolist())
        return np.zeros_like(x)

    losses = stream.losses(TEXTS, layer=1, replace=zeroed)
    assert seen == [place for tokens in TEXTS for place in range(len(tokens))]
    assert np.abs(losses - stream.losses(TEXTS)).max() > 0.01


def test_replacing_the_last_layer_by_zeros_leaves_nothing_to_tell_tokens_apart(
    stream: ResidualStream,
) -> None:
    losses = stream.losses(TEXTS, layer=2, replace=lambda x, positions: np.zeros_like(x))
    np.testing.assert_allclose(losses, np.log(259), rtol=1e-4)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_that_are_not_there_are_refused(stream: ResidualStream, layer: int) -> None:
    with pytest.raises(InvalidRequest, match="no layer"):
        stream.read(TEXTS, (layer,))
    with pytest.raises(InvalidRequest, match="no layer"):
        stream.losses(TEXTS, layer=layer, replace=lambda x, positions: x)


@pytest.mark.parametrize("length", [0, 129])
def test_texts_that_do_not_fit_are_refused(stream: ResidualStream, length: int) -> None:
    with pytest.raises(InvalidRequest, match="tokens"):
        stream.read([[1] * length], (0,))


def test_reading_gives_its_memory_back(stream: ResidualStream) -> None:
    for _ in range(200):
        stream.read([[1] * 60], (0,))
    with pytest.raises(ValueError, match="broken"):
        stream.losses([[1] * 60] * 3, layer=0, replace=_broken)
    for _ in range(200):
        stream.losses([[1] * 60])


def _broken(x: np.ndarray, positions: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    raise ValueError("broken")
