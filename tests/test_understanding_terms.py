"""Words, places and terms of tokens, in text that is short enough to check by eye."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.features.understanding import terms
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.passages import Passages
from fortpoint.features.understanding.terms import Kind, TermSpace
from fortpoint.features.understanding.token_classes import TokenClasses

TEXTS = (
    "<|end|>", " San", " Franc", "isco", " is", " in", " January", ".", "\n", '"', "(", ")",
    " bridges", "7", " in", " June",
)  # fmt: skip
CLASSES = TokenClasses(
    np.array([-1, 0, -1, -1, 1, 1, 2, -1, -1, -1, -1, -1, 0, -1, 1, 2], np.int32),
    ("San", "is/in", "January/June"),
)


def say(*windows: str) -> Passages:
    """Windows of tokens that are written with ``~`` between them."""
    ids = [[TEXTS.index(text) for text in window.split("~")] for window in windows]
    return Passages.of_texts(ids, role=1)


def held(passages: Passages, kind: Kind) -> list[set[str]]:
    lexicon = Lexicon(TEXTS, CLASSES)
    rows, values = terms.read(passages, lexicon)[kind]
    found: list[set[str]] = [set() for _ in range(len(passages))]
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        found[row].add(terms.name(kind, value, lexicon))
    return found


def test_word_is_put_together_from_its_pieces() -> None:
    said = say(" San~ Franc~isco~ is", "isco~ is")
    assert held(said, Kind.WORD) == [
        {"san"}, {"francisco"}, {"francisco"}, {"is"}, {"isco"}, {"is"},
    ]  # fmt: skip


def test_word_before_is_the_whole_one_and_none_at_a_window_start() -> None:
    said = say(" San~ Franc~isco~ is", " in~ January")
    assert held(said, Kind.BEFORE_WORD) == [set(), {"san"}, {"san"}, {"francisco"}, set(), {"in"}]
    assert held(said, Kind.BEFORE) == [set(), {"san"}, {"franc"}, {"isco"}, set(), {"in"}]
    assert held(said, Kind.NEXT) == [{"franc"}, {"isco"}, {"is"}, set(), {"january"}, set()]
    assert held(said, Kind.PHRASE)[2] == {"san francisco"}


def test_near_words_are_those_before_and_of_some_length() -> None:
    near = held(say(" San~ Franc~isco~ is~ in~ January"), Kind.NEAR)
    assert near == [set(), {"san"}, {"san"}, *[{"san", "francisco"}] * 3]


def test_classes_are_of_the_token_before_after_and_near() -> None:
    said = say(" San~ in~ June~.", ".~ is")
    assert held(said, Kind.CLASS) == [{"0"}, {"1"}, {"2"}, set(), set(), {"1"}]
    assert held(said, Kind.BEFORE_CLASS) == [set(), {"0"}, {"1"}, {"2"}, set(), set()]
    assert held(said, Kind.NEXT_CLASS) == [{"1"}, {"2"}, set(), set(), {"1"}, set()]
    assert held(said, Kind.NEAR_CLASS)[3] == {"0", "1", "2"}


def test_topic_is_a_class_met_three_times() -> None:
    topic = held(say(" in~ is~ June~ in~ San~ in"), Kind.TOPIC)
    assert topic == [set(), set(), set(), set(), {"1"}, {"1"}]


def test_places_tell_lines_sentences_quotes_brackets_and_repetition() -> None:
    said = say('<|end|>~ San~.~ in~"~ is~"~(~ in~)~ San~\n~ is')
    at = held(said, Kind.PLACE)
    assert "sentence start" in at[3]
    assert "sentence start" not in at[1]
    assert ["inside quotes" in found for found in at[4:8]] == [False, True, True, False]
    assert ["inside brackets" in found for found in at[7:11]] == [False, True, True, False]
    assert "repeated word" in at[8]
    assert "repeated word" not in at[3]
    assert "line start" in at[12]


def test_shapes_of_the_token_and_its_neighbours() -> None:
    said = say("<|end|>~ San~7~.")
    assert held(said, Kind.SHAPE) == [
        {"special token"}, {"capitalised"}, {"digits"}, {"punctuation"},
    ]  # fmt: skip
    assert held(said, Kind.BEFORE_SHAPE)[3] == {"digits"}
    assert held(said, Kind.NEXT_SHAPE)[1] == {"digits"}


def test_windows_do_not_see_each_other() -> None:
    apart = say(" San~ Franc~isco", " is~ in~ January")
    alone = say(" is~ in~ January")
    for kind in Kind:
        assert held(apart, kind)[3:] == held(alone, kind), kind


@pytest.mark.parametrize("kind", list(Kind))
def test_term_that_is_written_is_found_again(kind: Kind) -> None:
    lexicon = Lexicon(TEXTS, CLASSES)
    said = say('<|end|>~ San~ Franc~isco~.~ in~"~ is~ in~ bridges~(~ June~7', "\n~ is~ in~ is")
    _, values = terms.read(said, lexicon)[kind]
    assert len(values)
    for value in np.unique(values).tolist():
        written = terms.name(kind, value, lexicon)
        found = terms.value(kind, written, lexicon)
        assert found is not None
        assert terms.name(kind, found, lexicon) == written


@pytest.mark.parametrize("kind", list(Kind))
def test_term_of_no_meaning_is_found_nowhere(kind: Kind) -> None:
    assert terms.value(kind, "no such thing", Lexicon(TEXTS, CLASSES)) is None


def test_space_gives_each_row_the_terms_that_are_common_enough() -> None:
    lexicon = Lexicon(TEXTS, CLASSES)
    said = say(" San~ is~ in", " in~ is~ June")
    readings = terms.read(said, lexicon)
    space = TermSpace.learn(readings, len(said), min_count=2)
    table = space.incidence(readings, len(said))
    is_ = space.column(Kind.WORD, lexicon.find("is") or -1)
    assert is_ is not None
    assert space.term(is_) == (Kind.WORD, lexicon.find("is"))
    assert space.column(Kind.WORD, lexicon.find("june") or -1) is None
    has = [is_ in table.row(row) for row in range(len(said))]
    assert has == [False, True, False, False, True, False]
    other = say(" is~ San")
    seen = space.incidence(terms.read(other, lexicon), len(other))
    assert is_ in seen.row(0)
    assert is_ not in seen.row(1)
