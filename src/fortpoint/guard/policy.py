"""What is done about a score: rules that an operator writes, and one published order.

    policy_file.py      reads a policy, with the line of whatever is wrong in it
    decide(policy, scores, context)     pure and total: the same answer for the same question

A rule says: this detector, from this score on, this action, within this scope. The order:

1. Of the rules that match a score's detector, message role, direction, key, user, lease and
   model, those with the **most specific scope** count: the most of these fields named. At equal
   scope a rule that names the detector goes before one for all of them (``*``).
2. Of those, the ones whose threshold the score reaches; of these, the **gravest action**:
   allow, flag, redact, escalate, block.
3. Where none is reached, or none matches, the score is allowed.
4. Over all scores the gravest action stands.

So a rule for one key takes the place of the rule for everybody, also where it allows more. A
rule in shadow is left out of this, and what would have been done with it is said beside. Two
rules of equal precedence that both match something and contradict are refused when the policy
is read.

``redact`` takes what rules found out of an answer; a prompt cannot be changed without being
another prompt, so there it blocks. ``escalate`` asks a second model (``second_stage.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fortpoint.guard.account import AccountPolicy
from fortpoint.guard.conversation import ConversationPolicy
from fortpoint.types import Score

Action = Literal["allow", "flag", "redact", "escalate", "block"]
Direction = Literal["input", "output"]
RoleName = Literal["system", "user", "assistant", "tool"]

ANY = "*"
CALIBRATED: Final = "calibrated"
GRAVITY: Final[dict[Action, int]] = {
    "allow": 0,
    "flag": 1,
    "redact": 2,
    "escalate": 3,
    "block": 4,
}
SCOPES: Final = ("roles", "directions", "keys", "users", "leases", "models")

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Names = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=1000)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a policy. Unknown keys are refused."""


class Rule(_Strict, frozen=True, kw_only=True):
    """From ``threshold`` on, do ``action``. A scope that is left out matches everything."""

    id: Annotated[
        str,
        Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Its name in the record."),
    ]
    detector: Annotated[
        str, Meta(min_length=1, max_length=64, description="A detector's name, or `*` for all.")
    ]
    action: Annotated[Action, Meta(description="What is done.")]
    threshold: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | Literal["calibrated"],
        Meta(
            description="The score from which on; `calibrated` is the detector's own, for the "
            "evidence at hand and the role."
        ),
    ] = CALIBRATED
    roles: Annotated[
        Annotated[tuple[RoleName, ...], Meta(min_length=1, max_length=4)] | None,
        Meta(description="Whose message."),
    ] = None
    directions: Annotated[
        Annotated[tuple[Direction, ...], Meta(min_length=1, max_length=2)] | None,
        Meta(description="`input` for prompts, `output` for answers."),
    ] = None
    keys: Annotated[Names | None, Meta(description="Ids of keys.")] = None
    users: Annotated[Names | None, Meta(description="Names of users.")] = None
    leases: Annotated[Names | None, Meta(description="Ids of leases.")] = None
    models: Annotated[Names | None, Meta(description="Names of models.")] = None
    shadow: Annotated[
        bool, Meta(description="Record what it would have done, and do not do it.")
    ] = False


class SecondStagePolicy(_Strict, frozen=True, kw_only=True):
    """The model that is asked where a rule escalates."""

    url: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=2048,
            description="Base address with its version path (`https://guard.example/v1`).",
        ),
    ]
    model: Annotated[str, Meta(max_length=256, description="Its name there.")] = ""
    kind: Annotated[
        Literal["moderations", "chat"],
        Meta(
            description="`moderations` asks `/moderations`; `chat` asks a guard model at "
            "`/chat/completions` and reads `safe` or `unsafe`."
        ),
    ] = "moderations"
    api_key: Annotated[
        str,
        Meta(
            max_length=4096,
            description="Where its key is, never the key: `env:NAME` or `file:/path`.",
        ),
    ] = ""
    allow_plain_http: Annotated[
        bool, Meta(description="Take an `http://` address of another machine.")
    ] = False
    threshold: Annotated[
        float, Meta(ge=0, le=1, description="Its score from which on the text is blocked.")
    ] = 0.5
    timeout_s: Annotated[float, Meta(gt=0, le=60, description="Longest wait for it.")] = 2.0
    max_text_bytes: Annotated[
        int,
        Meta(ge=64, le=4 * 1024 * 1024, description="Longest text sent; of longer ones the end."),
    ] = 32_768
    max_concurrent: Annotated[
        int, Meta(ge=1, le=1024, description="Questions at once; beyond it as if it failed.")
    ] = 16
    on_failure: Annotated[
        Literal["closed", "open"],
        Meta(
            description="Where it fails or takes too long: `closed` refuses the request, `open` "
            "lets it pass with a flag."
        ),
    ] = "closed"


class Policy(_Strict, frozen=True, kw_only=True):
    """The whole of a policy file."""

    version: Annotated[
        str, Meta(min_length=1, max_length=64, description="Its author's name for this version.")
    ]
    shadow: Annotated[
        bool, Meta(description="No rule acts; all is recorded as what would have happened.")
    ] = False
    rules: Annotated[tuple[Rule, ...], Meta(max_length=256, description="In any order.")] = ()
    second_stage: SecondStagePolicy | None = None
    conversation: ConversationPolicy = ConversationPolicy()
    account: AccountPolicy = AccountPolicy()


@dataclass(frozen=True)
class Context:
    """Where a score was found, but for the message's role, which the score has."""

    direction: Direction
    key_id: str | None = None
    user: str | None = None
    lease: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Decision:
    """What to do, which rules say so, which score decided, and what shadow rules would do.

    ``shadow`` has the action that would stand with the rules in shadow, and their ids, only
    where it is another one.
    """

    action: Action
    rules: tuple[str, ...] = ()
    detector: str | None = None
    shadow: Action | None = None
    shadow_rules: tuple[str, ...] = ()
    escalated: tuple[str, ...] = field(default=())


def decide(policy: Policy, scores: Sequence[Score], context: Context) -> Decision:
    """The order above. ``escalated`` names the detectors whose score asks for a second stage."""
    live = [(_fired(policy.rules, score, context, shadow=False), score) for score in scores]
    action, rules, detector = _gravest(live)
    escalated = tuple(score.detector for fired, score in live if _action(fired) == "escalate")
    shadowed = policy.shadow or any(rule.shadow for rule in policy.rules)
    if not shadowed:
        return Decision(action, rules, detector, escalated=escalated)
    would = [(_fired(policy.rules, score, context, shadow=True), score) for score in scores]
    would_be, would_rules, _ = _gravest(would)
    if policy.shadow:
        action, rules, detector, escalated = "allow", (), None, ()
    if would_be == action:
        return Decision(action, rules, detector, escalated=escalated)
    return Decision(action, rules, detector, would_be, would_rules, escalated)


def specificity(rule: Rule) -> tuple[int, int]:
    """Precedence: scope fields that are named, then whether the detector is."""
    named = sum(getattr(rule, scope) is not None for scope in SCOPES)
    return named, int(rule.detector != ANY)


def _fired(
    rules: Sequence[Rule], score: Score, context: Context, *, shadow: bool
) -> tuple[Rule, ...]:
    """The most specific rules that match, as far as the score reaches them."""
    matching = [
        rule for rule in rules if (shadow or not rule.shadow) and _matches(rule, score, context)
    ]
    if not matching:
        return ()
    most = max(map(specificity, matching))
    return tuple(rule for rule in matching if specificity(rule) == most and _reaches(score, rule))


def _matches(rule: Rule, score: Score, context: Context) -> bool:
    return (
        rule.detector in (ANY, score.detector)
        and (rule.roles is None or score.role.value in rule.roles)
        and (rule.directions is None or context.direction in rule.directions)
        and (rule.keys is None or context.key_id in rule.keys)
        and (rule.users is None or context.user in rule.users)
        and (rule.leases is None or context.lease in rule.leases)
        and (rule.models is None or context.model in rule.models)
    )


def _reaches(score: Score, rule: Rule) -> bool:
    """A score that is no number reaches every threshold."""
    if not math.isfinite(score.score):
        return True
    if isinstance(rule.threshold, str):
        return score.flagged
    return score.score >= rule.threshold


def _action(fired: Sequence[Rule]) -> Action:
    return max((rule.action for rule in fired), key=_gravity, default="allow")


def _gravest(
    judged: Sequence[tuple[Sequence[Rule], Score]],
) -> tuple[Action, tuple[str, ...], str | None]:
    """The gravest action over all scores, the rules that ask for it, the surest detector."""
    action: Action = max((_action(fired) for fired, _ in judged), key=_gravity, default="allow")
    rules = dict.fromkeys(rule.id for fired, _ in judged for rule in fired if rule.action == action)
    if action == "allow":
        return action, tuple(rules), None
    asking = [score for fired, score in judged if _action(fired) == action]
    return action, tuple(rules), max(asking, key=_surety).detector


def _gravity(action: Action) -> int:
    return GRAVITY[action]


def _surety(score: Score) -> float:
    return score.score if math.isfinite(score.score) else 1.0
