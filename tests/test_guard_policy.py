"""One published order: the most specific scope, then the gravest action."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortpoint.guard.policy import GRAVITY, Context, Policy, Rule, decide
from fortpoint.guard.policy_file import shipped_policy
from fortpoint.types import Role, Score

_HERE = Context("input", key_id="k1", user="ada", lease="l1", model="m1")


def _score(value: float, detector: str = "jailbreak", role: Role = Role.USER) -> Score:
    return Score(detector, value, 0.7, role, not value < 0.7)


def _rule(action: str = "block", threshold: float | str = 0.5, **fields) -> Rule:
    ids = fields.pop("id", f"{action}-{threshold}-{'-'.join(fields)}")
    fields = {"detector": "jailbreak", "id": ids} | fields
    return Rule(action=action, threshold=threshold, **fields)


def _decide(*rules: Rule, scores=(_score(0.9),), context=_HERE, **more):
    return decide(Policy(version="t", rules=rules, **more), scores, context)


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("role", [Role.USER, Role.SYSTEM, Role.TOOL, Role.ASSISTANT])
@pytest.mark.parametrize("direction", ["input", "output"])
def test_shipped_policy_does_what_the_detectors_thresholds_say(flagged, role, direction):
    score = Score("injection", 0.4 if flagged else 0.99, 0.4 if flagged else 0.995, role, flagged)
    decision = decide(shipped_policy().policy, [score], Context(direction))
    assert decision.action == ("block" if flagged else "allow")
    assert decision.detector == ("injection" if flagged else None)


@pytest.mark.parametrize("secrets", ["flag", "redact", "block"])
def test_shipped_policy_does_with_secrets_what_the_setting_says(secrets):
    score = Score("secret", 1.0, 0.75, Role.ASSISTANT, True)
    decision = decide(shipped_policy(secrets).policy, [score], Context("output"))
    assert decision.action == secrets


@pytest.mark.parametrize(
    "scope",
    [
        {"keys": ("k1",)},
        {"users": ("ada",)},
        {"leases": ("l1",)},
        {"models": ("m1",)},
        {"roles": ("user",)},
        {"directions": ("input",)},
    ],
)
def test_decide_rule_of_a_scope_takes_the_place_of_the_rule_for_all(scope):
    assert _decide(_rule("block"), _rule("allow", 0.0, **scope)).action == "allow"
    assert _decide(_rule("allow", 0.0), _rule("block", **scope)).action == "block"


@pytest.mark.parametrize(
    "scope",
    [
        {"keys": ("k2",)},
        {"users": ("eve",)},
        {"leases": ("l2",)},
        {"models": ("m2",)},
        {"roles": ("tool", "system")},
        {"directions": ("output",)},
        {"detector": "injection"},
    ],
)
def test_decide_rule_of_another_scope_is_left_out(scope):
    assert _decide(_rule("block"), _rule("allow", 0.0, **scope)).action == "block"


def test_decide_specific_rule_that_is_not_reached_still_takes_the_place():
    assert _decide(_rule("block"), _rule("block", 0.95, keys=("k1",))).action == "allow"


def test_decide_more_scope_goes_before_a_named_detector():
    exempt = _rule("allow", 0.0, detector="*", keys=("k1",))
    assert _decide(_rule("block"), exempt).action == "allow"


def test_decide_named_detector_goes_before_all_of_them_at_equal_scope():
    assert _decide(_rule("block", detector="*"), _rule("flag")).action == "flag"


@pytest.mark.parametrize(
    ("score", "action"),
    [(0.2, "allow"), (0.3, "flag"), (0.5, "escalate"), (0.79, "escalate"), (0.8, "block")],
)
def test_decide_ladder_takes_the_gravest_step_that_is_reached(score, action):
    ladder = (_rule("flag", 0.3), _rule("escalate", 0.5), _rule("block", 0.8))
    decision = _decide(*ladder, scores=[_score(score)])
    assert decision.action == action
    assert decision.escalated == (("jailbreak",) if action == "escalate" else ())


def test_decide_gravest_of_all_scores_stands_and_names_its_rules():
    rules = (_rule("flag", 0.1), _rule("block", 0.5, detector="injection", id="stop"))
    scores = [_score(0.99), _score(0.6, "injection")]
    decision = _decide(*rules, scores=scores)
    assert (decision.action, decision.rules, decision.detector) == ("block", ("stop",), "injection")


def test_decide_score_that_is_no_number_reaches_every_threshold():
    assert _decide(_rule("block", 1.0), scores=[_score(math.nan)]).action == "block"


def test_decide_policy_in_shadow_does_nothing_and_says_what_it_would():
    decision = _decide(_rule("block", id="b"), shadow=True)
    assert (decision.action, decision.rules) == ("allow", ())
    assert (decision.shadow, decision.shadow_rules) == ("block", ("b",))


def test_decide_rule_in_shadow_leaves_the_others_alone():
    decision = _decide(_rule("flag", id="f"), _rule("block", id="b", shadow=True, keys=("k1",)))
    assert (decision.action, decision.rules) == ("flag", ("f",))
    assert (decision.shadow, decision.shadow_rules) == ("block", ("b",))


def test_decide_rule_in_shadow_that_would_change_nothing_is_not_said():
    assert _decide(_rule("block"), _rule("block", 0.4, shadow=True, keys=("k1",))).shadow is None


_names = st.sampled_from(["a", "b"])
_scopes = st.none() | st.lists(_names, min_size=1, max_size=2).map(tuple)
_rules = st.builds(
    Rule,
    id=st.just("r"),
    detector=st.sampled_from(["*", "jailbreak", "injection"]),
    action=st.sampled_from(list(GRAVITY)),
    threshold=st.floats(0, 1) | st.just("calibrated"),
    roles=st.none() | st.just(("user",)) | st.just(("tool",)),
    keys=_scopes,
    users=_scopes,
    shadow=st.booleans(),
)
_scores = st.builds(
    Score,
    st.sampled_from(["jailbreak", "injection", "other"]),
    st.floats(allow_nan=True),
    st.floats(0, 1),
    st.sampled_from(list(Role)),
    st.booleans(),
)


@given(
    st.lists(_rules, max_size=6).map(tuple),
    st.lists(_scores, max_size=5),
    st.booleans(),
    st.none() | _names,
)
def test_decide_is_total_and_the_rules_order_changes_no_action(rules, scores, shadow, key_id):
    context = Context("input", key_id=key_id, user="a")
    policy = Policy(version="t", rules=rules, shadow=shadow)
    turned = msgspec.structs.replace(policy, rules=tuple(reversed(rules)))
    decision, other = decide(policy, scores, context), decide(turned, scores, context)
    assert decision.action in GRAVITY
    assert (decision.action, decision.shadow) == (other.action, other.shadow)
    assert decision == decide(policy, scores, context)
