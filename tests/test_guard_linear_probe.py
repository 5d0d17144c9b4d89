"""A reading is checked before it is believed, and long texts are not averaged away."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.errors import GuardFailed
from fortpoint.guard.linear_probe import Readout, aggregate
from fortpoint.types import Reading, Role, Segment


def _reading(values: np.ndarray, *segments: Segment) -> Reading:
    values = values.astype("<f4")
    names = tuple(f"p{i}" for i in range(values.shape[1]))
    return Reading(names, len(values), values.tobytes(), segments)


_SEGMENTS = (
    Segment(Role.TEMPLATE, -1, 0, 2),
    Segment(Role.USER, 0, 2, 5),
    Segment(Role.TEMPLATE, -1, 5, 7),
)


def test_readout_tokens_are_the_messages_own() -> None:
    values = np.arange(14.0).reshape(7, 2)
    readout = Readout.unpack(_reading(values, *_SEGMENTS))
    assert readout.tokens_of(0).tolist() == values[2:5].tolist()
    tail = readout.tail_of(0)
    assert tail is not None
    assert tail.tolist() == values[6:7].tolist()


def test_readout_tail_of_an_earlier_message_is_none() -> None:
    segments = (
        Segment(Role.USER, 0, 0, 2),
        Segment(Role.TEMPLATE, -1, 2, 3),
        Segment(Role.USER, 1, 3, 5),
        Segment(Role.TEMPLATE, -1, 5, 7),
    )
    readout = Readout.unpack(_reading(np.zeros((7, 1)), *segments))
    assert readout.tail_of(0) is None
    assert readout.tail_of(1) is not None


def test_readout_raw_text_leaves_out_the_sequences_first_token() -> None:
    values = np.array([[100.0], [1.0], [2.0]])
    readout = Readout.unpack(_reading(values, Segment(Role.USER, 0, 0, 3)))
    assert readout.tokens_of(0).tolist() == [[1.0], [2.0]]
    assert readout.tail_of(0) is None


def test_readout_single_token_text_keeps_it() -> None:
    readout = Readout.unpack(_reading(np.array([[3.0]]), Segment(Role.USER, 0, 0, 1)))
    assert readout.tokens_of(0).tolist() == [[3.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_readout_value_that_is_not_finite_fails(bad: float) -> None:
    values = np.zeros((7, 1))
    values[3] = bad
    with pytest.raises(GuardFailed):
        Readout.unpack(_reading(values, *_SEGMENTS))


@pytest.mark.parametrize(
    "segments",
    [
        _SEGMENTS[:2],
        _SEGMENTS[1:],
        (_SEGMENTS[0], Segment(Role.USER, 0, 3, 7)),
        (Segment(Role.USER, 0, 0, 9),),
        (_SEGMENTS[0], Segment(Role.USER, 0, 2, 1), Segment(Role.USER, 0, 1, 7)),
    ],
)
def test_readout_segments_that_do_not_cover_fail(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(GuardFailed):
        Readout.unpack(_reading(np.zeros((7, 1)), *segments))


def test_readout_bytes_of_another_size_fail() -> None:
    with pytest.raises(GuardFailed):
        Readout.unpack(Reading(("p",), 7, b"\0" * 24, _SEGMENTS))


def test_aggregate_short_text_is_the_mean() -> None:
    values = np.array([[1.0, 0.0], [3.0, 4.0]], dtype=np.float32)
    assert aggregate(values).tolist() == [2.0, 2.0]


def test_aggregate_attack_inside_long_text_is_not_averaged_away() -> None:
    values = np.full((4000, 1), -3.0, dtype=np.float32)
    values[1970:2040] = 5.0
    assert aggregate(values)[0] == pytest.approx(5.0, abs=1e-4)


def test_aggregate_rolling_maximum_equals_the_slow_way() -> None:
    values = np.random.default_rng(3).normal(size=(200, 3)).astype(np.float32)
    slow = np.max([values[i : i + 64].mean(0) for i in range(137)], axis=0)
    assert np.allclose(aggregate(values), slow, atol=1e-5)
