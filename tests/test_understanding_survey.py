"""One pass over a harvest counts what was planted there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fortpoint.errors import ModelError
from fortpoint.features.activations import widen
from fortpoint.features.understanding.contexts import choose, contexts
from fortpoint.features.understanding.leaders import Leaders
from fortpoint.features.understanding.survey import (
    SHARD_PLACES,
    Settings,
    Survey,
    survey,
    unseen,
)
from planted_features import DEAD, DIGIT, FRANCISCO, ID, LAYER, MONTH, TEXTS, Planted, plant


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("harvest"))


@pytest.fixture(scope="module")
def seen(planted: Planted) -> Survey:
    return survey(planted.store, planted.dictionary, Settings(n_held_out=2), quiet)


def encoded(planted: Planted) -> tuple[np.ndarray, np.ndarray]:
    """Reference: activations and tokens of the learned shards without sinks."""
    acts, tokens = [], []
    for shard in planted.store.shards[:4]:
        kept = planted.store.kept(shard, LAYER)
        acts.append(planted.dictionary.encode(widen(shard.bits(LAYER)[kept])))
        tokens.append(shard.tokens[kept])
    return np.concatenate(acts), np.concatenate(tokens)


def test_counts_maxima_and_frequency_are_those_of_the_encoder(
    planted: Planted, seen: Survey
) -> None:
    acts, _ = encoded(planted)
    assert seen.n_tokens == len(acts)
    assert seen.counts.tolist() == (acts > 0).sum(axis=0).tolist()
    np.testing.assert_allclose(seen.maximum, acts.max(axis=0), rtol=1e-5)
    assert seen.counts[DEAD] == 0


def test_histogram_counts_every_active_token(planted: Planted, seen: Survey) -> None:
    acts, _ = encoded(planted)
    histogram = seen.histogram(8)
    assert histogram.sum(axis=1).tolist() == seen.counts.tolist()
    values = acts[:, DIGIT][acts[:, DIGIT] > 0]
    exact, _ = np.histogram(values, bins=8, range=(0, values.max()))
    assert np.abs(histogram[DIGIT] - exact).sum() <= 0.25 * len(values)


def test_leaders_are_the_strongest_of_different_documents(planted: Planted, seen: Survey) -> None:
    documents = seen.leaders.documents[MONTH]
    assert len(set(documents.tolist())) == len(documents)
    acts, _ = encoded(planted)
    assert seen.leaders.values[MONTH, 0] == pytest.approx(acts[:, MONTH].max(), rel=1e-5)
    assert (np.diff(seen.leaders.values, axis=1) <= 0).all()
    assert (seen.leaders.places[DEAD] == -1).all()


def test_leaders_offered_in_parts_are_those_offered_at_once() -> None:
    rng = np.random.default_rng(3)
    n = 4000
    features, documents = rng.integers(0, 7, n), rng.integers(0, 50, n)
    values = rng.random(n, np.float32) + np.float32(0.1)
    places = np.arange(n)
    at_once, in_parts = Leaders(8, 5), Leaders(8, 5)
    at_once.offer(features, values, places, documents)
    for part in np.array_split(rng.permutation(n), 9):
        in_parts.offer(features[part], values[part], places[part], documents[part])
    assert at_once.places.tolist() == in_parts.places.tolist()
    for feature in range(7):
        best: dict[int, float] = {}
        for i in np.flatnonzero(features == feature):
            best[documents[i]] = max(best.get(documents[i], 0), float(values[i]))
        expected = sorted(best.values(), reverse=True)[:5]
        np.testing.assert_allclose(at_once.values[feature], expected)


def test_held_out_part_shares_no_token_with_what_was_learned(
    planted: Planted, seen: Survey
) -> None:
    learned = set((seen.study.places // SHARD_PLACES).tolist())
    judged = set((seen.held_out.places // SHARD_PLACES).tolist())
    assert learned == {0, 1, 2, 3}
    assert judged.isdisjoint({0, 1, 2, 3})
    assert set(seen.study.documents.tolist()).isdisjoint(
        seen.held_out.documents[seen.held_out.kept].tolist()
    )
    assert (seen.leaders.places < 4 * SHARD_PLACES).all()
    alone = unseen(planted.store, planted.dictionary, 2, quiet)
    assert alone.active.columns.tolist() == seen.held_out.active.columns.tolist()
    assert alone.kept.tolist() == seen.held_out.kept.tolist()


def test_token_limit_reads_fewer_shards(planted: Planted) -> None:
    limit = len(planted.store.shards[0]) * 2
    seen = survey(planted.store, planted.dictionary, Settings(n_held_out=2, n_tokens=limit), quiet)
    assert len(seen.learned) == 2
    assert seen.n_tokens < limit


def test_contexts_show_the_token_that_was_planted(planted: Planted, seen: Survey) -> None:
    chosen = choose(seen, n_top=4, n_lesser=2)
    made = contexts(planted.store, planted.dictionary, seen, chosen, TEXTS)
    assert made[DEAD] == []
    for context in made[FRANCISCO]:
        assert context.tokens[context.peak] == " Francisco"
        assert context.strengths[context.peak] > 0
        assert len(context.tokens) == len(context.strengths) <= 19
        for token, strength in zip(context.tokens, context.strengths, strict=True):
            assert (strength > 0) == (token == " Francisco")
    assert [context.level for context in made[MONTH]] == [0, 0, 0, 0, 1, 2]
    strengths = [context.strengths[context.peak] for context in made[MONTH]]
    assert strengths[0] >= 99
    assert strengths[4] > strengths[5]


def test_contexts_never_reach_into_another_window(planted: Planted, seen: Survey) -> None:
    made = contexts(planted.store, planted.dictionary, seen, choose(seen, 8, 2), TEXTS)
    for feature in made:
        for context in feature:
            assert "<|end|>" not in context.tokens[1:]


def test_layer_that_was_not_harvested_is_refused(planted: Planted) -> None:
    from dataclasses import replace

    with pytest.raises(ModelError, match="layer 9 was not harvested"):
        survey(planted.store, replace(planted.dictionary, layer=9), Settings(), quiet)


def test_dictionary_of_another_width_is_refused(planted: Planted) -> None:
    from dataclasses import replace

    narrow = replace(planted.dictionary, encoder=planted.dictionary.encoder[:, :8].copy())
    with pytest.raises(ModelError, match="reads 8 numbers a token"):
        survey(planted.store, narrow, Settings(n_held_out=2), quiet)


def test_harvest_of_too_few_shards_is_refused(planted: Planted) -> None:
    with pytest.raises(ModelError, match="harvest more text"):
        survey(planted.store, planted.dictionary, Settings(n_held_out=6), quiet)


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    planted = plant(tmp_path / "harvest")
    path = planted.store.shards[1].path / f"layer-{LAYER}.npy"
    bits = np.load(path)
    bits[100, 3] = 0x7FC0  # NaN in bfloat16
    np.save(path, bits)
    with pytest.raises(ModelError, match="not finite"):
        survey(plant_again(tmp_path), planted.dictionary, Settings(n_held_out=2), quiet)


def plant_again(tmp_path: Path):
    from fortpoint.features.activations import ActivationStore

    return ActivationStore(tmp_path / "harvest")


def test_tokens_of_the_planted_text_are_the_ones_meant() -> None:
    assert TEXTS[ID[" Francisco"]] == " Francisco"
