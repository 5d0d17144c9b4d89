"""Effects, neighbours, company, clusters: against plain computations and planted groups."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.features.understanding.cluster_names import names
from fortpoint.features.understanding.clusters import cluster
from fortpoint.features.understanding.effects import effects
from fortpoint.features.understanding.incidence import Incidence
from fortpoint.features.understanding.index import Context, Feature, Rule, Term
from fortpoint.features.understanding.k_means import assign, k_means, unit_rows
from fortpoint.features.understanding.neighbours import coactive, nearest, together
from fortpoint.features.understanding.token_classes import TokenClasses
from test_understanding_index import feature


def groups(n: int = 90, d: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three bundles of directions, and the bundle of each."""
    rng = np.random.default_rng(seed)
    own = np.arange(n) % 3
    x = np.eye(d, dtype=np.float32)[own] + 0.1 * rng.standard_normal((n, d)).astype(np.float32)
    return x, own


def activity(own: np.ndarray, n_tokens: int = 5000, seed: int = 0) -> Incidence:
    """At each token features of one bundle are active."""
    rng = np.random.default_rng(seed)
    bundle = rng.integers(0, 3, n_tokens)
    active = (own[None, :] == bundle[:, None]) & (rng.random((n_tokens, len(own))) < 0.3)
    rows, columns = np.nonzero(active)
    return Incidence.of_sorted(rows, columns, np.ones(len(rows), np.float32), *active.shape)


def test_effects_are_the_extremes_of_decoder_times_unembedding() -> None:
    rng = np.random.default_rng(1)
    decoder = rng.standard_normal((150, 12)).astype(np.float32)
    readout = rng.standard_normal((300, 12)).astype(np.float32)
    shown = rng.random(300) < 0.7
    found = effects(decoder, readout, shown, n=4, n_bins=6)
    logits = decoder @ (readout - readout.mean(axis=0)).T
    for i in (0, 77, 149):
        ranked = [t for t in np.argsort(-logits[i]) if shown[t]]
        assert found.promoted[i].tolist() == ranked[:4]
        assert found.suppressed[i].tolist() == ranked[::-1][:4]
        np.testing.assert_allclose(found.promoted_values[i], logits[i][ranked[:4]], rtol=1e-4)
        exact, _ = np.histogram(logits[i], bins=6)
        assert np.abs(found.histogram[i] - exact).sum() <= 2
        assert found.histogram[i].sum() == 300


def test_effects_with_fewer_tokens_than_asked_name_them_all() -> None:
    shown = np.array([True, False, True])
    found = effects(np.eye(2, dtype=np.float32), np.eye(3, 2, dtype=np.float32), shown, n=10)
    assert found.promoted.shape == (2, 2)
    assert set(found.promoted[0].tolist()) == {0, 2}


def test_nearest_is_by_cosine_and_leaves_the_feature_itself_out() -> None:
    x, own = groups()
    x *= np.linspace(0.5, 4, len(x))[:, None]
    found = nearest(x, 5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    assert (found.features == np.argsort(-cosines, axis=1, kind="stable")[:, :5]).mean() > 0.99
    assert (own[found.features] == own[:, None]).all()


def test_together_counts_tokens_of_both_and_drops_rare_pairs() -> None:
    active = activity(groups(12)[1], 400)
    counts = together(active).toarray()
    dense = np.zeros((active.n_rows, 12))
    for row in range(active.n_rows):
        dense[row, active.row(row)] = 1
    expected = dense.T @ dense
    np.fill_diagonal(expected, 0)
    expected[expected < 8] = 0
    assert counts.tolist() == expected.tolist()


def test_company_is_closest_where_two_are_never_apart() -> None:
    dense = np.zeros((1000, 4), np.float32)
    dense[:100, 0] = dense[:100, 1] = 1
    dense[50:450, 2] = 1
    rows, columns = np.nonzero(dense)
    active = Incidence.of_sorted(rows, columns, dense[rows, columns], 1000, 4)
    totals = dense.sum(axis=0).astype(np.int64)
    found = coactive(together(active), totals, 1000, 3)
    assert found.features[0, 0] == 1
    assert found.closeness[0, 0] == pytest.approx(1.0)
    assert found.features[3].tolist() == [-1, -1, -1]


def test_clusters_find_planted_bundles_and_leave_the_dead_out() -> None:
    x, own = groups()
    active = activity(own)
    totals = np.bincount(active.columns, minlength=90)
    totals[7] = 0
    found = cluster(x, together(active), totals, n_clusters=3, seed=0)
    assert found.of_feature[7] == -1
    assert found.n == 3
    alive = np.flatnonzero(totals)
    pairs = {(own[i], found.of_feature[i]) for i in alive}
    assert len(pairs) == 3
    assert found.xy.min() == 0
    assert found.xy.max() == 1000
    apart = [found.xy[alive][own[alive] == g].mean(axis=0) for g in range(3)]
    spread = max(found.xy[alive][own[alive] == g].std() for g in range(3))
    assert (
        min(np.linalg.norm(apart[0] - apart[1]), np.linalg.norm(apart[1] - apart[2])) > 0.5 * spread
    )


def test_clusters_depend_on_the_seed_alone() -> None:
    x, own = groups(60)
    counts, totals = together(activity(own)), np.full(60, 100)
    one, two = (cluster(x, counts, totals, seed=4) for _ in range(2))
    assert one.of_feature.tolist() == two.of_feature.tolist()
    assert one.xy.tolist() == two.xy.tolist()


def test_clusters_of_hardly_any_live_features_are_one() -> None:
    x, own = groups(12)
    totals = np.array([5, 5, *[0] * 10])
    found = cluster(x, together(activity(own)), totals)
    assert found.of_feature.tolist() == [0, 0, *[-1] * 10]
    assert found.n == 1


def about(number: int, *words: str, kind: str = "word") -> Feature:
    terms = tuple(Term(kind, word, 1.0) for word in words)
    return feature(number, rule=Rule(0.0, terms), contexts=(Context((" of",), (100,), 0, 0),))


def test_cluster_is_named_by_what_its_members_share() -> None:
    features = [about(i, "Bridge", "fog" if i % 2 else "bay", f"w{i}x") for i in range(6)]
    features += [about(6 + i, "flour", "oven" if i % 2 else "sugar", f"v{i}x") for i in range(6)]
    found = names(features, np.repeat([0, 1], 6), 2)
    assert found[0].startswith("Bridge")
    assert found[1].startswith("flour")
    assert "w1x" not in found[0]


def test_cluster_without_a_shared_word_is_named_by_the_sort_of_its_tokens() -> None:
    features = [about(i, "inside a word", kind="place") for i in range(5)]
    features += [about(5 + i, "flour") for i in range(5)]
    assert names(features, np.repeat([0, 1], 5), 2) == ["inside a word", "flour"]


def test_clusters_that_share_the_same_words_have_names_of_their_own() -> None:
    features = [about(i) for i in range(4)]
    assert names(features, np.array([0, 0, 1, -1]), 2) == ["unnamed", "unnamed (2)"]


def test_k_means_gives_every_centre_a_point() -> None:
    x, own = groups(60)
    centers = k_means(unit_rows(x), 3, seed=1)
    nearest_one, cosines = assign(unit_rows(x), centers)
    assert len({(a, b) for a, b in zip(own, nearest_one, strict=True)}) == 3
    assert cosines.min() > 0.5
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, rtol=1e-5)


def test_token_classes_hold_like_tokens_and_none_that_never_occur() -> None:
    x, own = groups(30)
    counts = np.full(30, 5)
    counts[4] = 0
    texts = tuple(f" w{i}" for i in range(30))
    found = TokenClasses.learn(x, counts, texts, n_classes=3)
    assert found.of_token[4] == -1
    within = {(own[i], found.of_token[i]) for i in range(30) if i != 4}
    assert len({number for _, number in within}) == len(within) == len(found.names)
    assert all(len(name.split("/")) == 3 for name in found.names)
    packed = found.of_token.astype("<i2").tobytes()
    assert TokenClasses.stored(found.names, packed).of_token.tolist() == found.of_token.tolist()
