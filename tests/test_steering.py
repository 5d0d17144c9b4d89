"""Each change is its formula, row by row; conditions gate it, and divergence is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fortpoint.engine.protocol import Condition, Steer
from fortpoint.engine.steering import MAX_STEERS, Edits, Plan, Steered, Steering
from fortpoint.errors import InvalidRequest
from fortpoint.features.directions import Direction
from fortpoint.features.library import Library
from fortpoint.features.sae import Dictionary

D, N = 32, 8
SOURCE = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return SOURCE.standard_normal(shape, np.float32)


SAE = Dictionary(
    name="sae",
    layer=1,
    encoder=normal(N, D),
    bias=normal(N),
    threshold=np.full(N, 0.5, np.float32),
    decoder=normal(N, D),
    center=normal(D),
    training_max=np.arange(1, N + 1, dtype=np.float32),
    k=None,
)
BRIDGE = Direction("bridge", "m", 2, np.eye(D, dtype=np.float32)[3], bias=0.25, training_max=4.0)
LIBRARY = Library({"sae": SAE}, {"bridge": BRIDGE})
X = normal(5, D)


def act(feature: int) -> np.ndarray:
    """The feature's activation at each row of ``X``."""
    return SAE.encode(X)[:, feature]


def steered(layer: int, *steer: Steer, prompt: int = 0, stops: tuple[Condition, ...] = ()):
    """``X`` after the steering of all its rows, and what came of it."""
    plan = Plan.compile(steer, stops, LIBRARY)
    edits = Edits([Steered(plan, 0, len(X), 0, prompt)], len(X))
    x = X.copy()
    for each in range(layer + 1):
        edits.apply(each, x)
    return x, edits.outcome()


def test_add_moves_along_the_decoder() -> None:
    got, _ = steered(1, Steer("add", "sae/2", 1.5))
    np.testing.assert_allclose(got, X + 1.5 * 3.0 * SAE.decoder[2], atol=1e-5, rtol=1.3e-6)


def test_clamp_sets_the_feature_and_keeps_the_rest() -> None:
    got, _ = steered(1, Steer("clamp", "sae/2", 2.0))
    change = (2.0 * 3.0 - act(2))[:, None] * SAE.decoder[2]
    np.testing.assert_allclose(got, X + change, atol=1e-4, rtol=1e-4)


def test_ablate_leaves_nothing_along_the_direction() -> None:
    got, _ = steered(2, Steer("ablate", "bridge"))
    assert np.abs(got[:, 3]).max() < 1e-6
    np.testing.assert_allclose(got[:, 4:], X[:, 4:], atol=1e-5, rtol=1.3e-6)


def test_changes_of_one_layer_are_made_in_order() -> None:
    got, _ = steered(2, Steer("add", "bridge", 1.0), Steer("ablate", "bridge"))
    assert np.abs(got[:, 3]).max() < 1e-6
    got, _ = steered(2, Steer("ablate", "bridge"), Steer("add", "bridge", 1.0))
    np.testing.assert_allclose(got[:, 3], 4.0, atol=1e-5, rtol=1.3e-6)


def test_condition_gates_row_by_row() -> None:
    above = float(np.median(act(5))) / 6.0
    got, _ = steered(2, Steer("add", "bridge", 1.0, when=Condition("sae/5", above)))
    moved = (got != X).any(axis=1)
    assert np.array_equal(moved, act(5) > above * 6.0)
    assert 0 < moved.sum() < 5


def test_condition_reads_before_the_changes_of_its_layer() -> None:
    condition = Condition("sae/5", float(act(5).max()) / 6.0 + 10)
    wishes = (Steer("clamp", "sae/5", 100.0), Steer("add", "sae/2", 1.0, when=condition))
    got, _ = steered(1, *wishes)
    expected, _ = steered(1, wishes[0])
    assert np.array_equal(got, expected)


def test_scope_answer_leaves_the_prompt() -> None:
    got, _ = steered(2, Steer("add", "bridge", 1.0, scope="answer"), prompt=3)
    assert np.array_equal(got[:3], X[:3])
    assert (got[3:, 3] != X[3:, 3]).all()


def test_stop_when_names_the_rows_of_the_answer() -> None:
    above = float(np.median(act(5))) / 6.0
    _, outcome = steered(1, stops=(Condition("sae/5", above),), prompt=1)
    expected = {row for row in range(1, 5) if act(5)[row] > above * 6.0}
    assert outcome.stopped == expected
    assert outcome.diverged == frozenset()


def test_negative_condition_always_holds() -> None:
    _, outcome = steered(1, stops=(Condition("sae/5", -1.0),))
    assert outcome.stopped == set(range(5))


def test_divergence_is_seen_in_its_rows_alone() -> None:
    huge = Dictionary(
        **{**SAE.__dict__, "name": "huge", "training_max": np.full(N, 1e30, np.float32)},
    )
    library = Library({"huge": huge, "sae": SAE})
    wild = Plan.compile([Steer("clamp", "huge/0", 100.0)], (), library)
    mild = Plan.compile([Steer("add", "sae/0", 1.0)], (), library)
    edits = Edits([Steered(wild, 0, 2, 0, 0), Steered(mild, 2, 5, 0, 0)], 5)
    x = X.copy()
    with np.errstate(all="ignore"):
        edits.apply(1, x)
    assert edits.outcome().diverged == {0, 1}
    np.testing.assert_allclose(x[2:], X[2:] + SAE.decoder[0], atol=1e-5, rtol=1.3e-6)


def test_apply_to_a_part_of_the_rows_is_that_part_of_the_whole() -> None:
    plan = Plan.compile([Steer("clamp", "sae/2", 2.0)], (), LIBRARY)
    edits = Edits([Steered(plan, 1, 4, 0, 0)], 5)
    whole, part = X.copy(), X[2:].copy()
    edits.apply(1, whole)
    edits.apply(1, part, first_row=2)
    assert np.array_equal(whole[2:], part)
    assert np.array_equal(whole[0], X[0])


def test_steering_keeps_its_table_while_the_rows_stay() -> None:
    steering, plan = Steering(), Plan.compile([Steer("add", "bridge", 1.0)], (), LIBRARY)
    first = steering.edits([Steered(plan, 0, 1, 7, 3)], 2)
    assert steering.edits([Steered(plan, 0, 1, 8, 3)], 2) is first
    assert steering.edits([Steered(plan, 1, 2, 8, 3)], 2) is not first
    assert steering.edits([], 2) is None


@pytest.mark.parametrize(
    ("steer", "complaint"),
    [
        (Steer("add", "sae/2", math.nan), "from -100 to 100"),
        (Steer("add", "sae/2", 1e9), "from -100 to 100"),
        (Steer("clamp", "sae/8", 1.0), "features 0 to 7"),
        (Steer("clamp", "sae/-1", 1.0), "features 0 to 7"),
        (Steer("clamp", "sae/two", 1.0), "features 0 to 7"),
        (Steer("add", "sae", 1.0), "is a dictionary"),
        (Steer("add", "nobody", 1.0), "no direction 'nobody'"),
        (Steer("add", "nobody/1", 1.0), "no dictionary 'nobody'"),
        (Steer("add", "../../etc/passwd", 1.0), "no dictionary"),
        (Steer("add", "sae/2", 1.0, when=Condition("bridge", 0.5)), "not known yet at layer 1"),
        (Steer("add", "sae/2", 1.0, when=Condition("sae/2", math.inf)), "finite"),
        (Steer("push", "sae/2", 1.0), "add, clamp or ablate"),
    ],
)
def test_steer_that_cannot_be_done_is_refused(steer: Steer, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        Plan.compile([steer], (), LIBRARY)


def test_more_changes_than_the_limit_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        Plan.compile([Steer("add", "sae/2", 1.0)] * (MAX_STEERS + 1), (), LIBRARY)
