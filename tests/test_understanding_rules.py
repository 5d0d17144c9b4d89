"""Rules and their scores, on tables of terms that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from fortpoint.features.understanding.incidence import Incidence
from fortpoint.features.understanding.rules import Settings, Table, learn
from fortpoint.features.understanding.scoring import Settings as Scoring
from fortpoint.features.understanding.scoring import judge, score, trial

NONE = np.empty(0, np.int64)


def table(terms: np.ndarray, active: np.ndarray) -> Table:
    """Dense 0/1 matrices: tokens by terms, and tokens by features."""
    rows, columns = np.nonzero(terms)
    acts_rows, features = np.nonzero(active)
    values = active[acts_rows, features].astype(np.float32)
    found = Incidence.of_sorted(acts_rows, features, values, *active.shape)
    return Table.of(
        Incidence.of_pairs(rows, columns, *terms.shape), found.transposed(), np.arange(len(terms))
    )


def made(n: int = 6000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Active where term 3 or term 5 holds; 20 other terms hold at random."""
    rng = np.random.default_rng(seed)
    terms = rng.random((n, 20)) < 0.1
    active = np.zeros((n, 2))
    active[:, 0] = (terms[:, 3] | terms[:, 5]) * rng.uniform(1, 2, n)
    active[:, 1] = rng.random(n) < 0.05
    return terms, active


def test_rule_has_the_terms_that_decide_and_predicts_new_tokens() -> None:
    fitted = learn(table(*made()), 0, NONE, Settings())
    assert fitted is not None
    assert set(fitted.columns[:2].tolist()) == {3, 5}
    assert (fitted.weights > 0).all()
    assert fitted.bias < 0
    unseen = table(*made(seed=1))
    judged = judge(unseen, fitted, trial(unseen, 0, NONE, Scoring()))  # type: ignore[arg-type]
    assert judged.balanced > 0.98


def test_rule_of_noise_is_no_better_than_a_coin_on_new_tokens() -> None:
    fitted = learn(table(*made()), 1, NONE, Settings())
    unseen = table(*made(seed=1))
    judged = judge(unseen, fitted, trial(unseen, 1, NONE, Scoring()))  # type: ignore[arg-type]
    assert abs(judged.balanced - 0.5) < 0.15


def test_rule_keeps_no_more_terms_than_it_may() -> None:
    fitted = learn(table(*made()), 0, NONE, Settings(max_terms=1))
    assert fitted is not None
    assert len(fitted.columns) == 1


def test_feature_that_is_hardly_ever_active_gets_no_rule_and_no_trial() -> None:
    terms, active = made()
    active[:, 0] = 0
    active[:5, 0] = 1
    assert learn(table(terms, active), 0, NONE, Settings()) is None
    assert trial(table(terms, active), 0, NONE, Scoring()) is None


def test_trial_has_both_sides_and_hard_cases_from_like_features() -> None:
    terms, active = made()
    held = table(terms, active)
    found = trial(held, 0, np.array([1]), Scoring(n_each=40, n_hard=10))
    assert found is not None
    assert len(found.active) == len(found.inactive) == 40
    assert found.n_hard == 10
    assert (active[found.active, 0] > 0).all()
    assert (active[found.inactive, 0] == 0).all()
    assert (active[found.inactive[:10], 1] > 0).all()


def test_trial_draws_active_tokens_from_all_strengths() -> None:
    terms, active = made()
    held = table(terms, active)
    found = trial(held, 0, NONE, Scoring(n_each=50))
    assert found is not None
    values = active[found.active, 0]
    assert (np.diff(values) >= 0).all()
    every = np.sort(active[:, 0][active[:, 0] > 0])
    assert values[25] == pytest.approx(every[len(every) // 2], rel=0.1)


def test_rule_that_calls_everything_active_scores_a_half() -> None:
    held = table(*made())
    found = trial(held, 0, NONE, Scoring())
    assert found is not None
    everything = np.ones(len(found.active) + len(found.inactive), bool)
    assert score(found, everything).balanced == 0.5
    assert score(found, ~everything).balanced == 0.5
    assert judge(held, None, found).balanced == 0.5


def test_rule_is_the_same_every_time() -> None:
    one, two = (learn(table(*made()), 0, NONE, Settings()) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.columns.tolist() == two.columns.tolist()
    assert one.weights.tolist() == two.weights.tolist()
