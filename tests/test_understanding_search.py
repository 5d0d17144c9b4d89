"""Words of queries and of features: what counts as the same, and what is found first."""

from __future__ import annotations

import pytest

from fortpoint.features.understanding.feature_words import (
    context_words,
    has_phrase,
    words_with_weights,
)
from fortpoint.features.understanding.index import Context, Index, Keyword, Rule, Term
from fortpoint.features.understanding.kinds import members
from fortpoint.features.understanding.search import Search
from fortpoint.features.understanding.spelling import Spellings
from fortpoint.features.understanding.wording import meanings, shares, words_of
from test_understanding_index import feature, made

BRIDGE = Context(
    (" the", " Golden", " Gate", " Bridge", " in", " fog"), (0, 0, 60, 100, 5, 0), 3, 0
)
KITCHEN = Context((" a", " cup", " of", " sugar", " ?"), (0, 0, 0, 100, 0), 3, 0)
OTHER = Context((" one", " of", " many"), (0, 100, 0), 1, 0)


def index() -> Index:
    """Of five features: bridges, the kitchen, "of", question marks, dogs by keyword alone."""
    none = {"neighbours": (), "coactive": (), "rule": None, "promoted": (), "label": "x"}
    return made(
        feature(0, contexts=(BRIDGE,), **none),
        feature(1, contexts=(KITCHEN,), **none),
        feature(2, contexts=(OTHER,), **none),
        feature(3, contexts=(Context((" why", "?", "\n"), (0, 100, 0), 1, 0),), **none),
        feature(4, contexts=(OTHER,), keywords=(Keyword("dogs", 35),), **none),
    )


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("golden gate bridge", 0),
        ("bridges", 0),
        ("BRIDGE", 0),
        ("the golden gate", 0),
        ("brigde", 0),
        ("sugar", 1),
        ("sugary", 1),
        ("question marks", 3),
        ("?", 3),
        ("dog", 4),
        ("a word like dog", 4),
    ],
)
def test_search_puts_the_feature_meant_first(query: str, first: int) -> None:
    assert Search(index()).words(query)[0].feature == first


def test_search_names_no_dead_feature() -> None:
    dead = feature(0, label="sugar", frequency=0.0, neighbours=(), coactive=())
    alive = feature(1, label="salt", neighbours=(), coactive=())
    assert Search(made(dead, alive)).words("sugar") == []


def test_search_gives_no_more_than_asked_for() -> None:
    assert len(Search(index()).words("of", 1)) == 1
    assert Search(index()).words("of", 0) == []


def test_context_word_counts_by_strength_then_by_sight() -> None:
    found = context_words(BRIDGE)
    assert found["bridge"] == 1.0
    assert found["gate"] == 0.6
    assert found["bridge"] > found["golden"] == found["the"] > found["fog"] > 0


def test_word_in_pieces_counts_as_one() -> None:
    context = Context((" Franc", "isco", "'s"), (0, 90, 0), 1, 0)
    assert context_words(context)["francisco"] == 0.9


def test_phrase_is_there_only_with_an_active_token_within() -> None:
    assert has_phrase(BRIDGE, ["golden", "gate"])
    assert not has_phrase(BRIDGE, ["gate", "golden"])
    assert not has_phrase(KITCHEN, ["a", "cup"])


def test_class_of_a_rule_counts_by_the_words_that_it_is_shown_with() -> None:
    rule = Rule(0.0, (Term("near-class", "0", 1.0), Term("class", "99", 1.0)))
    found = words_with_weights(feature(0, rule=rule), "bridges", ("March/June",))
    assert {"march", "june", "bridge"} <= set(found)
    assert "99" not in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The bridges' fog!", ["the", "bridge", "'", "fog", "!"]),
        ("cities glass bus foxes", ["city", "glass", "bus", "fox"]),
        ("John's snake_case", ["john", "snake", "_", "case"]),
        ("", []),
    ],
)
def test_words_are_made_alike(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_word_that_names_a_mark_means_it_alone_where_that_is_clear() -> None:
    assert meanings("comma", ["comma"]) == {",": 1.0}
    assert meanings("question", ["question", "mark"]) == {"?": 1.0}
    assert meanings("question", ["question"]) == {"question": 1.0, "?": 0.8}
    assert meanings("bridge", ["bridge"]) == {"bridge": 1.0}


def test_little_words_count_little_unless_they_are_all_there_is() -> None:
    found = shares(["the", "bridge"])
    assert found["the"] < found["bridge"] == 1.0
    assert shares(["the", "of"]) == {"the": 1.0, "of": 1.0}


def test_spellings_grown_from_a_word_and_mistyped() -> None:
    spellings = Spellings(["except", "exception", "exceptions", "law", "lawn", "bridge"])
    assert [word for word, _ in spellings.grown_from("exception")] == ["exceptions", "except"]
    assert [word for word, _ in spellings.grown_from("lawyer")] == ["law"]
    assert spellings.grown_from("law") == []
    assert spellings.alike("brigde")[0][0] == "bridge"
    assert spellings.alike("zzz") == []


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("months of the year", "January"),
        ("days of the week", "Friday"),
        ("question words", "why"),
        ("negation", "not"),
        ("Python function definition", "def"),
    ],
)
def test_kind_of_words_is_found_by_its_members(asked: str, first: str) -> None:
    none = {"neighbours": (), "coactive": (), "rule": None, "promoted": (), "label": "x"}
    others = [feature(i, contexts=(OTHER,), **none) for i in range(4)]
    about = Context((" on", f" {first}", " the"), (0, 100, 0), 1, 0)
    found = Search(made(*others, feature(4, contexts=(about,), **none))).words(asked)
    assert found[0].feature == 4


def test_kind_is_asked_for_by_all_words_of_its_name() -> None:
    assert "day" in members(words_of("days of the week"))
    assert members(words_of("a rainy day")) == {}
    assert members([]) == {}
