"""Sampling: the right distribution, the right support, and nothing from the neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fortpoint.engine.protocol import Sampling
from fortpoint.engine.sampler import Chosen, Row, Sampler, choose
from fortpoint.errors import EngineError

VOCAB = 12
LOGITS = np.array([3, -1, 2.5, 0, 1, 1.5, -2, 2, 0.5, -0.5, -3, 1.2], np.float32)


def row(*values: float) -> Row:
    return np.array(values, np.float32)


def softmax(logits: Row) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return weights / weights.sum()


def sampler(choice: int = 0, prompt: tuple[int, ...] = (), **sampling: Any) -> Sampler:
    return Sampler(Sampling(100, **sampling), choice, prompt)


def draws(state: Sampler, n: int, logits: Row = LOGITS) -> list[int]:
    return [the(choose(logits[None], [state])).token for _ in range(n)]


def the(chosen: list[Any]) -> Chosen:
    (only,) = chosen
    assert isinstance(only, Chosen), only
    return only


def reference_support(logits: Row, **rule: Any) -> set[int]:
    """The kept tokens by plain definitions on a sorted list, in double precision."""
    p = softmax(logits / rule.get("temperature", 1.0)).tolist()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if 0 < (k := rule.get("top_k", 0)) < len(p):
        order = [i for i in order if p[i] >= p[order[k - 1]]]
    wanted, mass, nucleus = rule.get("top_p", 1.0) * sum(p[i] for i in order), 0.0, []
    for i in order:
        if nucleus and mass >= wanted:
            break
        nucleus.append(i)
        mass += p[i]
    return {i for i in nucleus if p[i] >= rule.get("min_p", 0.0) * max(p)}


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_draws_follow_the_softmax_over_what_is_kept(rule: dict[str, Any]) -> None:
    n = 4000
    counts = np.bincount(draws(sampler(seed=5, **rule), n), minlength=VOCAB)

    kept = sorted(reference_support(LOGITS, **rule))
    p = softmax(LOGITS[kept] / rule.get("temperature", 1.0))
    assert counts.sum() == counts[kept].sum()
    chi_square = float((((counts[kept] - n * p) ** 2) / (n * p)).sum())
    # Wilson and Hilferty's approximation of the 99.9 % quantile.
    free = max(len(kept) - 1, 1)
    assert chi_square < free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=40),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 45),
    st.sampled_from([0.1, 0.5, 0.93, 1.0]),
    st.sampled_from([0.0, 0.013, 0.3]),
)
def test_draws_stay_in_the_support_of_the_definitions(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(values, np.float32)
    rule = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    # Ties at the nucleus' edge stay, so compare probabilities, with room for rounding.
    least = min(values[i] for i in reference_support(logits, **rule))
    drawn = draws(sampler(seed=1, **rule), 30, logits)

    assert min(values[i] for i in drawn) >= least - 1e-4


def test_top_p_zero_takes_the_likeliest() -> None:
    assert set(draws(sampler(top_p=0.0), 20)) == {0}


def test_top_k_one_takes_the_likeliest() -> None:
    assert set(draws(sampler(top_k=1, temperature=2.0), 20)) == {0}


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert len(set(draws(sampler(top_k=10_000, temperature=2.0, seed=3), 2000))) == VOCAB


def test_draws_from_many_blocks_follow_the_softmax() -> None:
    logits = np.full(3000, -40.0, np.float32)
    logits[[0, 255, 256, 1500, 2999]] = [0.0, 1.0, 0.5, 1.5, 0.2]
    counts = np.bincount(draws(sampler(seed=4), 4000, logits), minlength=3000) / 4000

    np.testing.assert_allclose(counts, softmax(logits), atol=0.03)


@pytest.mark.parametrize("k", [1, 5, 11, 12, 13, 600])
def test_top_k_of_many_blocks_keeps_the_k_largest(k: int) -> None:
    logits = np.random.default_rng(k).permutation(3100).astype(np.float32) / 3100
    drawn = set(draws(sampler(top_k=k, temperature=2.0, seed=3), 300, logits))

    assert drawn <= set(np.argsort(logits)[-k:].tolist())
    assert len(drawn) > k * 0.3


def test_flat_nucleus_is_found_beyond_the_likely_tokens() -> None:
    logits = np.full(30_000, -11.0, np.float32)  # each far below a ten-thousandth of the first
    logits[0] = 0.0
    drawn = draws(sampler(top_p=0.9, seed=2), 200, logits)

    assert 0 in drawn
    assert len(set(drawn)) > 20


def test_greedy_takes_the_first_of_equals() -> None:
    assert draws(sampler(temperature=0.0), 1, row(0.0, 2.0, 2.0, 1.0)) == [1]


def test_tiny_temperature_is_greedy() -> None:
    assert set(draws(sampler(temperature=1e-300), 20)) == {0}


def test_huge_logits_are_no_trouble() -> None:
    assert draws(sampler(temperature=0.1), 1, row(-3e38, 3e38, 0.0)) == [1]


def test_same_seed_and_choice_give_the_same_tokens() -> None:
    assert draws(sampler(seed=9), 50) == draws(sampler(seed=9), 50)
    assert draws(sampler(seed=9), 50) != draws(sampler(seed=9, choice=1), 50)
    assert draws(sampler(seed=9), 50) != draws(sampler(seed=10), 50)


def test_without_a_seed_answers_differ() -> None:
    assert draws(sampler(), 50) != draws(sampler(), 50)


def test_row_alone_and_in_any_batch_gives_the_same() -> None:
    logits = np.random.default_rng(1).normal(0, 4, (8, 5000)).astype(np.float32)
    rules: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 40, "logprobs": 5},
        {"min_p": 0.05, "presence_penalty": 1.0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 2.0},
        {"temperature": 0.0, "logprobs": 2},
        {"top_p": 0.3},
    ]
    alone = [sampler(i, prompt=(1, 2), seed=4, **rule) for i, rule in enumerate(rules)]
    together = [sampler(i, prompt=(1, 2), seed=4, **rule) for i, rule in enumerate(rules)]
    for _ in range(20):
        batch = choose(logits[::-1], together[::-1])
        singly = [the(choose(logits[i : i + 1], [alone[i]])) for i in range(8)]
        assert batch[::-1] == singly


def test_logits_stay_as_they_are() -> None:
    logits = LOGITS.copy()[None]
    choose(logits, [sampler(prompt=(0,), repetition_penalty=2.0, presence_penalty=2.0, top_k=3)])

    assert np.array_equal(logits[0], LOGITS)


def test_penalties_follow_their_formulas() -> None:
    class Spy:
        def mask(self, scores: Row) -> None:
            self.row = scores.copy()

        def accept(self, token: int) -> None:
            pass

    spy = Spy()
    sampling = Sampling(
        9, 0.0, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5
    )
    state = Sampler(sampling, 0, (1, 6, 6), spy)
    for _ in range(4):
        choose(LOGITS[None], [state])
    # Chosen so far: 0, 2, 7, 5 (each fell below the next); 1 and 6 only stand in the prompt.
    expected = LOGITS.copy()
    for token in (0, 2, 7):
        expected[token] = LOGITS[token] / 1.5 - 0.5 - 0.25
    expected[1], expected[6] = LOGITS[1] * 1.5, LOGITS[6] * 1.5
    assert np.allclose(spy.row, expected)


def test_frequency_penalty_counts_each_time() -> None:
    logits = row(1.0, 0.0, -9.0)
    # 0 leads by 1; after its third time it has lost 1.2.
    assert draws(sampler(temperature=0.0, frequency_penalty=0.4), 4, logits) == [0, 0, 0, 1]


def test_presence_penalty_counts_once() -> None:
    logits = row(1.0, 0.0, -9.0)
    assert draws(sampler(temperature=0.0, presence_penalty=0.9), 4, logits) == [0, 0, 0, 0]


def test_repetition_penalty_looks_at_the_prompt_and_the_others_do_not() -> None:
    logits = row(1.0, 0.9, -9.0)
    assert draws(sampler(prompt=(0,), temperature=0.0, repetition_penalty=2.0), 1, logits) == [1]
    assert draws(sampler(prompt=(0,), temperature=0.0, presence_penalty=2.0), 1, logits) == [0]


def test_logprobs_are_the_models_own_and_rounded() -> None:
    rule = {"temperature": 0.1, "top_k": 1, "prompt": (0,), "repetition_penalty": 2.0}
    chosen = the(choose(LOGITS[None], [sampler(logprobs=3, **rule)]))

    expected = np.log(softmax(LOGITS))
    assert chosen.token == 2
    assert chosen.logprob == round(float(expected[2]), 2)
    assert chosen.top == tuple((i, round(float(expected[i]), 2)) for i in (0, 2, 7))


def test_logprobs_are_at_most_five_and_none_unless_asked_for() -> None:
    assert len(the(choose(LOGITS[None], [sampler(logprobs=20)])).top or ()) == 5
    assert the(choose(LOGITS[None], [sampler(logprobs=0)])).top == ()
    plain = the(choose(LOGITS[None], [sampler()]))
    assert (plain.logprob, plain.top) == (None, None)


def test_row_without_a_next_token_fails_alone() -> None:
    class DeadEnd:
        def mask(self, scores: Row) -> None:
            scores[:] = -np.inf

        def accept(self, token: int) -> None:
            raise AssertionError("nothing was chosen")

    stuck = Sampler(Sampling(9), 0, (), DeadEnd())
    failed, fine = choose(np.stack([LOGITS, LOGITS]), [stuck, sampler(temperature=0.0)])

    assert isinstance(failed, EngineError)
    assert fine == Chosen(0)
