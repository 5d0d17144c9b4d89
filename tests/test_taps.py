"""What is read equals the plain formulas, for one row, many, and any mixture of wishes."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.protocol import Watch
from fortpoint.engine.taps import MAX_TOP, Rows, Taps
from fortpoint.errors import InvalidRequest
from fortpoint.features.library import Library
from fortpoint.features.sae import Dictionary
from fortpoint.types import Role, Segment

D, N = 64, 300
SOURCE = np.random.default_rng(9)


def normal(*shape: int) -> np.ndarray:
    return SOURCE.standard_normal(shape, np.float32)


def dictionary(name: str, layer: int, threshold: float, k: int | None = None) -> Dictionary:
    return Dictionary(
        name=name,
        layer=layer,
        encoder=normal(N, D) / 8,
        bias=normal(N) / 10,
        threshold=np.full(N, threshold, np.float32),
        decoder=normal(N, D),
        center=normal(D) / 4,
        training_max=SOURCE.random(N, np.float32) + np.float32(0.5),
        k=k,
    )


SPARSE, DENSE, TOPK = dictionary("sparse", 1, 2.0), dictionary("dense", 2, 0.0), None
TOPK = dictionary("topk", 1, 0.0, k=12)
LIBRARY = Library({"sparse": SPARSE, "dense": DENSE, "topk": TOPK})
W = np.random.default_rng(2).normal(size=(2, 3, D)).astype(np.float32)
B = np.array([0.5, -1.0, 2.0], np.float32)
PROBES = LinearProbes(("a", "b", "c"), (0, 2), W, B)
SEEN = {layer: normal(9, D) for layer in (0, 1, 2)}


@pytest.fixture
def taps() -> Taps:
    return Taps(LIBRARY, PROBES)


def expected_features(of: Dictionary, x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    readings = of.encode(x) / of.training_max
    indices = np.argsort(-readings, axis=-1)[:, :top]
    values = np.take_along_axis(readings, indices, axis=-1)
    return np.where(values > 0, indices, -1), values


def test_probes_read_the_normalised_stream(taps: Taps) -> None:
    [part] = taps.read([Rows(0, 9)], SEEN)
    expected = np.tile(B.astype(np.float64), (9, 1))
    for layer, weights in zip((0, 2), W, strict=True):
        x = SEEN[layer].astype(np.float64)
        expected += x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) @ weights.T
    np.testing.assert_allclose(part.logits, expected, atol=1e-4)


@pytest.mark.parametrize("of", [SPARSE, DENSE, TOPK], ids=lambda of: of.name)
@pytest.mark.parametrize("top", [1, 12, 32, 200])
def test_features_are_the_strongest_in_order(taps: Taps, of: Dictionary, top: int) -> None:
    [part] = taps.read([Rows(0, 9, Watch((of.name,), top))], SEEN)
    [read] = part.features
    indices, values = expected_features(of, SEEN[of.layer], top)
    np.testing.assert_allclose(read.values, values, atol=1e-4)
    assert np.array_equal(read.indices, indices)


def test_rows_read_what_each_of_them_watches(taps: Taps) -> None:
    rows = [
        Rows(0, 2),
        Rows(2, 5, Watch(("sparse",), 3)),
        Rows(5, 9, Watch(("dense", "sparse"), 7)),
    ]
    parts = taps.read(rows, SEEN)
    assert [len(part.logits) for part in parts] == [2, 3, 4]
    assert [[read.dictionary for read in part.features] for part in parts] == [
        [],
        ["sparse"],
        ["dense", "sparse"],
    ]
    indices, _ = expected_features(SPARSE, SEEN[1][5:], 7)
    assert np.array_equal(parts[2].features[1].indices, indices)
    indices, _ = expected_features(SPARSE, SEEN[1][2:5], 3)
    assert np.array_equal(parts[1].features[0].indices, indices)


def test_layers_are_those_that_somebody_reads(taps: Taps) -> None:
    assert taps.layers([Rows(0, 9)]) == (0, 2)
    assert taps.layers([Rows(0, 9, Watch(("sparse",)))]) == (0, 1, 2)
    assert taps.last_layer() == 2
    assert taps.last_layer(Watch(("sparse",))) == 1


def test_reading_joins_the_parts_of_a_prompt(taps: Taps) -> None:
    watch = Watch(("sparse",), 4)
    parts = taps.read([Rows(0, 4, watch), Rows(4, 9, watch)], SEEN)
    [whole] = taps.read([Rows(0, 9, watch)], SEEN)
    reading = taps.reading(parts, (Segment(Role.USER, 0, 0, 9),))
    assert reading.probes == ("a", "b", "c")
    assert reading.logits == whole.logits.tobytes()
    assert reading.features[0].indices == whole.features[0].indices.tobytes()


def test_row_that_is_not_finite_has_no_features_and_harms_no_other(taps: Taps) -> None:
    seen = {layer: x.copy() for layer, x in SEEN.items()}
    seen[1][3] = np.nan
    watch = Watch(("sparse",), 4)
    [part], [clean] = taps.read([Rows(0, 9, watch)], seen), taps.read([Rows(0, 9, watch)], SEEN)
    assert (part.features[0].indices[3] == -1).all()
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert np.array_equal(part.features[0].indices[others], clean.features[0].indices[others])


def test_nothing_to_read_is_an_empty_reading() -> None:
    none = Taps(Library(), LinearProbes.none(D))
    [part] = none.read([Rows(0, 9)], {})
    assert part.logits.shape == (9, 0)
    assert none.layers([Rows(0, 9)]) == ()


@pytest.mark.parametrize(
    ("watch", "complaint"),
    [
        (Watch(("sparse",), 0), "top is a number"),
        (Watch(("sparse",), MAX_TOP + 1), "top is a number"),
        (Watch(("sparse", "sparse"), 3), "twice"),
        (Watch(("nobody",), 3), "no dictionary 'nobody'"),
    ],
)
def test_watch_that_cannot_be_done_is_refused(taps: Taps, watch: Watch, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        taps.check(watch)


def test_watch_of_a_width_that_the_reader_cannot_take_is_refused() -> None:
    odd = Dictionary(
        **{**SPARSE.__dict__, "name": "odd", "encoder": np.zeros((N, 48), np.float32)},
    )
    with pytest.raises(InvalidRequest, match="multiple of 32"):
        Taps(Library({"odd": odd}), LinearProbes.none(48)).check(Watch(("odd",), 3))
