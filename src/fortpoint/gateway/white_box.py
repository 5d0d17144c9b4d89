"""The request's ``"fortpoint"`` field: what to read and to change inside the model.

    {"fortpoint": {"steer": [{"mode": "add", "target": "l15/1207", "strength": 4}],
                   "watch": {"dictionaries": ["l15"], "top": 8}}}

Who may: ``extraction.features`` and ``extraction.steering`` say whose keys. A condition
(``stop_when``, a steer's ``when``) tells its caller about a feature too, one bit a token, so it
goes with steering. Names are checked here against what the engine has loaded, so that the
error names the field; the engine checks them again. A ``preset`` is steering that the operator
saved (``presets.py``): it goes to the keys that have it, whoever may steer by hand.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fortpoint.access.keys import Principal
from fortpoint.config import Extraction
from fortpoint.engine.protocol import Condition, Description, Generate, Steer, Watch
from fortpoint.errors import Forbidden, InvalidRequest
from fortpoint.gateway import limits

MAX_FEATURES_PER_TOKEN = 256
MAX_FEATURES = 256 * 1024  # that one request may have us hold, some 30 MB
_MAX_INDEX_DIGITS = 9

Name = Annotated[
    str, Meta(min_length=1, max_length=128, extra_json_schema={"pattern": "^[^\\u0000]+$"})
]
PresetName = Annotated[
    Name, Meta(description="Steering that the operator saved and gave to this key.")
]
Target = Annotated[Name, Meta(description="`<dictionary>/<index>`, or the name of a direction.")]
Units = Annotated[
    float, Meta(ge=-100, le=100, description="In units of the feature's training maximum.")
]
TopK = Annotated[int, Meta(ge=-1, le=1_000_000, description="0 and -1 are off.")] | None
MinP = Annotated[float, Meta(ge=0, le=1)] | None
RepetitionPenalty = Annotated[float, Meta(ge=0.1, le=10)] | None


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Our own fields: an unknown one is refused, and the nearest known one named."""


class ConditionField(_Strict, frozen=True, kw_only=True):
    """Holds at a token where the feature reads more than ``above``."""

    feature: Target
    above: Units


class SteerField(_Strict, frozen=True, kw_only=True):
    """One change of the residual stream: add so much of a feature, set it to so much, or
    remove it. ``scope`` ``answer`` leaves the prompt as it is."""

    mode: Literal["add", "clamp", "ablate"]
    target: Target
    strength: Units = 0.0
    scope: Literal["all", "answer"] = "all"
    when: ConditionField | None = None


class WatchField(_Strict, frozen=True, kw_only=True):
    """The strongest features at each token; ``top`` of each dictionary, 256 in all."""

    dictionaries: Annotated[
        list[Name],
        Meta(min_length=1, max_length=16, extra_json_schema={"uniqueItems": True}),
    ]
    top: Annotated[int, Meta(ge=1, le=MAX_FEATURES_PER_TOKEN)] = 16


Steers = Annotated[list[SteerField], Meta(max_length=16)] | None
Conditions = Annotated[list[ConditionField], Meta(max_length=16)] | None


class WhiteBox(_Strict, frozen=True, kw_only=True):
    """Our own part of a request. Unknown keys are refused."""

    steer: Steers = None
    preset: PresetName | None = None
    stop_when: Conditions = None
    watch: WatchField | None = None
    adapter: Name | None = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = None


class NothingInside(_Strict, frozen=True, kw_only=True):
    """Our own part of a request that has nothing to ask for. Unknown keys are refused."""


NOTHING = WhiteBox()


def check(asked: WhiteBox) -> None:
    """What a type cannot say. Raises ``InvalidRequest``."""
    limits.check_texts((name for _, name in _names(asked)), 64 * 1024, "fortpoint")
    if asked.watch is None:
        return
    named = asked.watch.dictionaries
    if len(set(named)) < len(named):
        raise InvalidRequest("a dictionary is named twice", param="fortpoint.watch.dictionaries")
    limits.check_count(
        len(named) * asked.watch.top,
        MAX_FEATURES_PER_TOKEN,
        "fortpoint.watch.top",
        "features a token",
    )


def check_allowed(asked: WhiteBox, principal: Principal, extraction: Extraction) -> None:
    """Raise ``Forbidden`` for what this key may not ask."""
    if principal.role == "operator":
        return
    if asked.watch is not None and extraction.features != "all":
        raise _kept("features are shown", "features", "watch")
    for name, wish in (("steer", asked.steer), ("stop_when", asked.stop_when)):
        if wish and extraction.steering != "all":
            raise _kept("the model is steered", "steering", name)


def check_names(asked: WhiteBox, description: Description, under: str = "fortpoint.") -> None:
    """Raise ``InvalidRequest`` for a name of nothing that the engine has loaded.

    ``under`` is the path of the part of the request that has the fields.
    """
    if asked.adapter is not None and asked.adapter not in description.adapters:
        raise _unknown("adapter", description.adapters, asked.adapter, f"{under}adapter")
    dictionaries = {card.name: card.n_features for card in description.dictionaries}
    for number, name in enumerate(asked.watch.dictionaries if asked.watch else ()):
        if name not in dictionaries:
            param = f"{under}watch.dictionaries[{number}]"
            raise _unknown("dictionary", dictionaries, name, param)
    check_targets(_targets(asked), description, under)


def check_steers(fields: list[SteerField], description: Description, under: str) -> None:
    """Raise ``InvalidRequest`` for a steer by nothing that the engine has loaded."""
    check_targets(_targets(WhiteBox(steer=fields)), description, under)


def check_targets(targets: Iterable[tuple[str, str]], description: Description, under: str) -> None:
    """Raise ``InvalidRequest`` for the first of these paths and names that is not loaded."""
    dictionaries = {card.name: card.n_features for card in description.dictionaries}
    for param, target in targets:
        _check_target(target, dictionaries, description.directions, under + param)


def check_volume(watch: Watch | None, n_tokens: int) -> None:
    """Raise ``InvalidRequest`` when the features of so many tokens are too many to hold."""
    if watch is not None and n_tokens * watch.top * len(watch.dictionaries) > MAX_FEATURES:
        raise InvalidRequest(
            f"these are more than {MAX_FEATURES} features in all; watch fewer, ask for fewer "
            "tokens or for a stream",
            param="fortpoint.watch.top",
        )


def wanted(asked: WhiteBox, request: Generate) -> Generate:
    """``request`` with what is asked of the inside."""
    watch = asked.watch
    return msgspec.structs.replace(
        request,
        adapter=asked.adapter,
        watch=None if watch is None else Watch(tuple(watch.dictionaries), watch.top),
        steer=steers(asked.steer),
        stop_when=tuple(_condition(condition) for condition in asked.stop_when or ()),
    )


def steers(fields: list[SteerField] | None) -> tuple[Steer, ...]:
    """In the engine's terms."""
    return tuple(
        Steer(
            field.mode,
            field.target,
            field.strength,
            field.scope,
            None if field.when is None else _condition(field.when),
        )
        for field in fields or ()
    )


def _condition(field: ConditionField) -> Condition:
    return Condition(field.feature, field.above)


def _targets(asked: WhiteBox) -> Iterator[tuple[str, str]]:
    """The path and the name of every feature or direction that is asked for."""
    for number, steer in enumerate(asked.steer or ()):
        yield f"steer[{number}].target", steer.target
        if steer.when is not None:
            yield f"steer[{number}].when.feature", steer.when.feature
    for number, condition in enumerate(asked.stop_when or ()):
        yield f"stop_when[{number}].feature", condition.feature


def _names(asked: WhiteBox) -> Iterator[tuple[str, str]]:
    yield from _targets(asked)
    if asked.preset is not None:
        yield "preset", asked.preset
    if asked.adapter is not None:
        yield "adapter", asked.adapter
    for name in asked.watch.dictionaries if asked.watch else ():
        yield "watch.dictionaries", name


def _check_target(
    target: str, dictionaries: dict[str, int], directions: tuple[str, ...], param: str
) -> None:
    name, slash, index = target.partition("/")
    if not slash:
        if target not in directions:
            raise _unknown("direction", directions, target, param)
        return
    if name not in dictionaries:
        raise _unknown("dictionary", dictionaries, name, param)
    known = index.isascii() and index.isdigit() and len(index) <= _MAX_INDEX_DIGITS
    if not known or int(index) >= dictionaries[name]:
        raise InvalidRequest(f"{name} has the features 0 to {dictionaries[name] - 1}", param=param)


def _unknown(kind: str, known: Iterable[str], name: str, param: str) -> InvalidRequest:
    """The input is not repeated; the nearest known name is given."""
    near: list[Any] = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}?" if near else "none is loaded"
    return InvalidRequest(f"there is no such {kind}; {hint}", param=param)


def _kept(what: str, setting: str, field: str) -> Forbidden:
    return Forbidden(
        f"{what} for operators only (extraction.{setting})", param=f"fortpoint.{field}"
    )
