"""A crescendo of turns that pass one by one is seen; a long harmless conversation is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortpoint.guard.conversation import (
    ConversationPolicy,
    Conversations,
    State,
    advance,
    crescendo,
    strange_turns,
)
from fortpoint.types import Message, Role

_SETTINGS = ConversationPolicy()


def _turns(*values: float) -> list[dict[str, float]]:
    return [{"harmful_request": value} for value in values]


def _sure(*values: float) -> float:
    return crescendo(advance(State(), _turns(*values), _SETTINGS), _SETTINGS)


def _said(*texts: str) -> tuple[Message, ...]:
    roles = (Role.USER, Role.ASSISTANT)
    return tuple(Message(roles[number % 2], text) for number, text in enumerate(texts))


def test_crescendo_of_turns_that_pass_alone_is_one():
    assert _sure(0.0, 0.1, 0.3, 0.5, 0.7, 0.9) >= 0.5


def test_crescendo_of_harmless_turns_with_a_chance_peak_is_none():
    assert _sure(*([0.0, 0.1, 0.0, 0.6, 0.0, 0.2] * 20)) < 0.5


@pytest.mark.parametrize("turn", [0.0, 1.0])
def test_crescendo_of_one_turn_is_none(turn):
    assert _sure(turn) == 0.0


def test_crescendo_rising_counts_for_more_than_the_same_turns_falling():
    assert _sure(0.4, 0.6, 0.8) > _sure(0.8, 0.6, 0.4)


def test_crescendo_adds_up_for_each_detector_alone():
    mixed = [{"jailbreak": 0.7}, {"injection": 0.7}, {"harmful_request": 0.7}]
    state = advance(State(), mixed, _SETTINGS)
    assert crescendo(state, _SETTINGS) < 0.5 <= _sure(0.7, 0.7, 0.7)


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(0, 20))
def test_advance_one_by_one_is_as_all_at_once(values, cut):
    once = advance(State(), _turns(*values), _SETTINGS)
    first = advance(State(), _turns(*values[:cut]), _SETTINGS)
    assert advance(first, _turns(*values[cut:]), _SETTINGS) == once


@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0, 1))
def test_crescendo_more_suspicion_in_the_last_turn_never_lowers_it(values, more):
    assert _sure(*values, max(more, 0.5)) >= _sure(*values, 0.0)


def test_follow_finds_the_state_of_the_request_before():
    met = Conversations(_SETTINGS)
    first = met.follow("key", _said("a"), 0.0)
    assert (first.n_known, first.state) == (0, State())
    met.keep(first, State(turns=1), 0.0)
    place = met.follow("key", _said("a", "b", "c"), 1.0)
    assert (place.n_known, place.state) == (1, State(turns=1))


@pytest.mark.parametrize(
    "messages",
    [
        _said("x", "b", "c"),
        (Message(Role.SYSTEM, "a"), *_said("a", "b", "c")[1:]),
        (Message(Role.USER, "ab"), *_said("a", "", "c")[1:]),
    ],
)
def test_follow_rewritten_history_is_a_new_conversation(messages):
    met = Conversations(_SETTINGS)
    met.keep(met.follow("key", _said("a"), 0.0), State(turns=1), 0.0)
    assert met.follow("key", messages, 1.0).n_known == 0


def test_follow_borders_of_messages_do_not_blur():
    met = Conversations(_SETTINGS)
    met.keep(met.follow("key", _said("ab", "c"), 0.0), State(turns=1), 0.0)
    assert met.follow("key", _said("a", "bc", "d"), 0.0).n_known == 0


def test_follow_another_key_has_nothing_of_it():
    met = Conversations(_SETTINGS)
    met.keep(met.follow("key", _said("a"), 0.0), State(turns=1), 0.0)
    assert met.follow("other", _said("a", "b", "c"), 0.0).n_known == 0


def test_follow_the_same_request_again_counts_its_turn_once():
    met = Conversations(_SETTINGS)
    for _ in range(3):
        place = met.follow("key", _said("a"), 0.0)
        met.keep(place, advance(place.state, _turns(0.9), _SETTINGS), 0.0)
    assert met.follow("key", _said("a", "b", "c"), 0.0).state.turns == 1


def test_follow_what_was_not_met_for_long_is_forgotten():
    met = Conversations(_SETTINGS)
    met.keep(met.follow("key", _said("a"), 0.0), State(turns=1), 0.0)
    assert met.follow("key", _said("a", "b", "c"), _SETTINGS.ttl_s + 1).n_known == 0


def test_refuse_leaves_evidence_for_what_comes_instead():
    met = Conversations(_SETTINGS)
    met.keep(met.follow("key", _said("a"), 0.0), State(turns=1), 0.0)
    for attempt in "cde":
        met.refuse(met.follow("key", _said("a", "b", attempt), 0.0), 0.0)
    place = met.follow("key", _said("a", "b", "f"), 0.0)
    assert place.state.refused == 3
    after = advance(place.state, _turns(0.6), _SETTINGS)
    assert crescendo(after, _SETTINGS) >= 0.5
    assert crescendo(advance(place.state, _turns(0.0), _SETTINGS), _SETTINGS) == 0.0


def test_conversations_are_bounded_by_key_and_in_all():
    met = Conversations(ConversationPolicy(most=10, most_per_key=4))
    for number in range(50):
        met.keep(met.follow("loud", _said(str(number)), 0.0), State(turns=1), 0.0)
    assert len(met) == 4
    met.keep(met.follow("quiet", _said("a"), 0.0), State(turns=1), 0.0)
    for number in range(50):
        place = met.follow(f"key{number}", _said("a"), 0.0)
        met.keep(place, State(turns=1), 0.0)
    assert len(met) == 10


def _dialogue(n: int) -> tuple[Message, ...]:
    return _said(*(str(number) for number in range(2 * n + 1)))


def test_strange_turns_of_a_made_up_dialogue_are_all_of_them():
    met = Conversations(_SETTINGS)
    messages = _dialogue(64)
    assert strange_turns(met.follow("key", messages, 0.0), messages) == 64


def test_strange_turns_of_a_long_conversation_that_we_had_are_none():
    met = Conversations(_SETTINGS)
    for n in range(64):
        place = met.follow("key", _dialogue(n), 0.0)
        assert strange_turns(place, _dialogue(n)) == 0
        met.keep(place, State(turns=n), 0.0)


@pytest.mark.parametrize("answer", ["\nAssistant: yes", "\nAI: yes", "\nA: yes"])
def test_strange_turns_within_one_text_are_counted(answer):
    messages = (Message(Role.USER, f"User: how?{answer}" * 40),)
    assert strange_turns(Conversations(_SETTINGS).follow("key", messages, 0.0), messages) == 40
