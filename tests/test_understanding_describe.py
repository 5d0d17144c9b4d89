"""What is planted is named, judged, found and put together; what has no pattern is not praised."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fortpoint.features.understanding.describe import COMPACT, describe
from fortpoint.features.understanding.index import Index
from fortpoint.features.understanding.passages import Passages
from fortpoint.features.understanding.predict import lexicon_of, predict
from fortpoint.features.understanding.search import Search, rank_by_activity
from planted_features import (
    AFTER_THE,
    COOKING,
    DEAD,
    DIGIT,
    FEATURES,
    FRANCISCO,
    ID,
    KITCHEN,
    MONTH,
    MONTHS,
    NOISE,
    SAN,
    TEXTS,
    Planted,
    plant,
    settings,
)


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("harvest"))


@pytest.fixture(scope="module")
def index(planted: Planted) -> Index:
    return made(planted)


def made(planted: Planted) -> Index:
    return describe(
        planted.store, planted.dictionary, "sha256:1", planted.model, settings(n_clusters=3), quiet
    )


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        (FRANCISCO, {"francisco"}),
        (MONTH, {"january", "may", "october"}),
        (AFTER_THE, {"the"}),
        (COOKING, {"sugar", "oven", "whisk"}),
        (DIGIT, {"digits", "7", "3"}),
    ],
    ids=[FEATURES[i] for i in (FRANCISCO, MONTH, AFTER_THE, COOKING, DIGIT)],
)
def test_planted_feature_is_labelled_and_its_label_predicts_unseen_text(
    index: Index, feature: int, words: set[str]
) -> None:
    found = index.features[feature]
    rule = found.rule
    assert rule is not None
    spoken = found.label.lower() + " ".join(index.header.classes).lower()
    assert any(word in spoken for word in words), found.label
    assert found.label_score is not None
    assert found.label_score > (0.85 if feature == COOKING else 0.95)


def test_label_of_noise_scores_like_a_coin(index: Index) -> None:
    score = index.features[NOISE].label_score
    assert score is not None
    assert 0.35 < score < 0.65


def test_dead_feature_says_so_and_has_no_score(index: Index) -> None:
    dead = index.features[DEAD]
    assert (dead.label, dead.label_score, dead.rule) == ("never active", None, None)
    assert dead.frequency == 0
    assert dead.contexts == ()
    assert dead.cluster == -1
    assert index.header.n_dead == 1


def test_header_counts_what_was_read(planted: Planted, index: Index) -> None:
    header = index.header
    kept = [
        len(planted.store.kept(shard, planted.dictionary.layer)) for shard in planted.store.shards
    ]
    assert header.n_tokens == sum(kept[:4])
    assert header.n_held_out_tokens == sum(kept[4:])
    assert header.n_judged == len(FEATURES) - 1
    scores = [f.label_score for f in index.features if f.label_score is not None]
    assert header.mean_score == pytest.approx(np.mean(scores), abs=1e-3)


def test_effects_name_the_token_that_the_decoder_row_writes(index: Index) -> None:
    assert index.features[FRANCISCO].promoted[0].token == " Bay"
    assert index.features[COOKING].promoted[0].token == " sugar"
    assert index.features[COOKING].suppressed[0].token == "."
    assert index.features[COOKING].suppressed[0].logit < 0


def test_neighbours_and_company_are_those_planted(index: Index) -> None:
    assert index.features[FRANCISCO].neighbours[0].index == SAN
    assert index.features[FRANCISCO].neighbours[0].closeness == 80
    assert index.features[FRANCISCO].coactive[0].index == SAN
    assert index.features[SAN].coactive[0].index == FRANCISCO
    assert index.features[FRANCISCO].coactive[0].closeness > 90


def test_stored_rule_predicts_on_a_new_text(index: Index) -> None:
    lexicon = lexicon_of(index, TEXTS)
    text = [ID[token] for token in ("<|end|>", " in", " San", " Francisco", " the", " June", "4")]
    said = {
        feature: predict(
            index.features[feature].rule,  # type: ignore[arg-type]
            Passages.of_texts([text], role=1),
            lexicon,
        )
        > 0
        for feature in (FRANCISCO, MONTH, DIGIT)
    }
    assert said[FRANCISCO].tolist() == [False, False, False, True, False, False, False]
    assert said[MONTH].tolist() == [False, False, False, False, False, True, False]
    assert said[DIGIT].tolist() == [False, False, False, False, False, False, True]


@pytest.mark.parametrize(
    ("query", "feature"),
    [
        ("francisco", FRANCISCO),
        ("San Francisco", FRANCISCO),
        ("months like october", MONTH),
        ("franciscos", FRANCISCO),
        ("Franciso", FRANCISCO),
        ("butter and flour", COOKING),
    ],
)
def test_search_finds_the_feature_by_words(index: Index, query: str, feature: int) -> None:
    found = [hit.feature for hit in Search(index).words(query, 3)]
    both = {FRANCISCO, SAN} if feature == FRANCISCO else {feature}
    assert both & set(found[:2]), found


@pytest.mark.parametrize("query", ["", "   ", "zzzzqqqq", "\x00\x1b[2J", "a" * 100_000])
def test_search_for_nothing_sensible_finds_nothing_or_something_and_ends(
    index: Index, query: str
) -> None:
    assert len(Search(index).words(query, 5)) <= 5


def test_search_by_example_ranks_the_rare_feature_that_is_active_first(index: Index) -> None:
    acts = np.zeros((4, len(FEATURES)), np.float32)
    acts[1, FRANCISCO] = 3.0
    acts[:, COOKING] = 0.4
    assert rank_by_activity(acts, index)[0].feature == FRANCISCO
    assert rank_by_activity(acts[:0], index) == []
    assert rank_by_activity(np.zeros_like(acts), index) == []


def test_describing_twice_gives_the_same_bytes(planted: Planted, index: Index) -> None:
    assert made(planted).packed() == index.packed()


def test_compact_index_keeps_less(planted: Planted, index: Index) -> None:
    from dataclasses import replace

    compact = replace(COMPACT, survey=settings().survey)
    small = describe(planted.store, planted.dictionary, "sha256:1", planted.model, compact, quiet)
    assert len(small.packed()) < 0.8 * len(index.packed())
    assert [f.label for f in small.features] == [f.label for f in index.features]


def test_every_feature_of_a_month_or_the_kitchen_is_in_the_vocabulary() -> None:
    assert all(" " + word in ID for word in (*MONTHS.split(), *KITCHEN.split()))


def test_keywords_stand_in_sight_of_the_strongest_tokens(index: Index) -> None:
    words = {keyword.word: keyword.share for keyword in index.features[FRANCISCO].keywords}
    assert words["San"] == 100
    assert words["Francisco"] > 85
    cooking = [keyword.word for keyword in index.features[COOKING].keywords]
    assert sum(word in KITCHEN.split() for word in cooking) >= len(cooking) - 1 >= 5
    assert index.features[DEAD].keywords == ()


def test_keywords_are_as_many_as_asked_for(planted: Planted) -> None:
    few = describe(
        planted.store, planted.dictionary, "", planted.model, settings(n_keywords=2), quiet
    )
    assert max(len(feature.keywords) for feature in few.features) == 2


def test_label_shows_the_features_own_words_for_a_class(index: Index) -> None:
    assert "words like" in index.features[MONTH].label
    named = set(re.findall(r"[A-Z][a-z]+", index.features[MONTH].label))
    assert named <= set(MONTHS.split())
