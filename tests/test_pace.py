"""The number of threads follows the clock: away from what has become slow, and back."""

from __future__ import annotations

from fortpoint.engine.compiled.pace import MAX_ROWS, Pace


def passes(pace: Pace, n: int, seconds: dict[int, float], n_rows: int = 4) -> list[int]:
    """The numbers of threads of ``n`` passes that take this long with each."""
    chosen = []
    for _ in range(n):
        chosen.append(pace.choose(n_rows))
        pace.note(n_rows, chosen[-1], seconds[chosen[-1]])
    return chosen


def test_pace_takes_the_faster_number() -> None:
    assert passes(Pace(2), 50, {1: 2.0, 2: 1.0})[2:] == [2] * 48
    assert passes(Pace(2), 50, {1: 1.0, 2: 2.0})[2:] == [1] * 48


def test_pace_leaves_what_a_neighbour_slows_and_comes_back() -> None:
    pace = Pace(2)
    passes(pace, 20, {1: 2.0, 2: 1.0})
    beside_a_neighbour = passes(pace, 20, {1: 2.0, 2: 9.0})
    assert beside_a_neighbour[-10:] == [1] * 10
    alone_again = passes(pace, 2000, {1: 2.0, 2: 1.0})
    assert alone_again[-100:].count(2) >= 98


def test_pace_forgives_one_slow_pass() -> None:
    pace = Pace(2)
    passes(pace, 20, {1: 2.0, 2: 1.0})
    pace.note(4, 2, 30.0)
    assert pace.choose(4) == 2


def test_pace_rarely_tries_the_slower_number() -> None:
    assert passes(Pace(2), 1000, {1: 3.0, 2: 1.0}).count(1) <= 5


def test_pace_judges_sizes_apart() -> None:
    pace = Pace(2)
    passes(pace, 10, {1: 1.0, 2: 2.0}, n_rows=1)
    passes(pace, 10, {1: 2.0, 2: 1.0}, n_rows=32)
    assert (pace.choose(1), pace.choose(32)) == (1, 2)


def test_pace_gives_large_passes_and_lone_threads_all_there_are() -> None:
    assert set(passes(Pace(2), 10, {2: 9.0}, n_rows=MAX_ROWS + 1)) == {2}
    assert set(passes(Pace(1), 10, {1: 1.0})) == {1}
