"""Saved steering: what a request's key has, and how an operator keeps it.

    applied = await presets.applied(services.presets, principal, inside.preset, model)
    wanted = presets.steered(applied, wanted)      # before the request's own steers

A key's default comes first, then the preset that is asked for, then the request's own. Who has
a preset needs no right to steer. A preset whose features are not loaded, or that was made for
another model, refuses the request: an operator who has a key steered relies on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from fortpoint.access.keys import Principal
from fortpoint.access.presets import KEY_ID_PATTERN, NAME_PATTERN, Assigned, Preset
from fortpoint.audit.entry import Inside, PresetUse
from fortpoint.engine.client import Engine
from fortpoint.engine.protocol import Description, Generate, ScoreText, Steer
from fortpoint.errors import InvalidRequest, PresetUnavailable, SteeringDiverged
from fortpoint.gateway import white_box, wire
from fortpoint.gateway.services import Presets
from fortpoint.gateway.white_box import SteerField, WhiteBox

_S = TypeVar("_S", Generate, ScoreText)

MAX_STEERS = 16

PresetTitle = Annotated[str, Meta(pattern=NAME_PATTERN)]
KeyIds = Annotated[
    list[Annotated[str, Meta(pattern=KEY_ID_PATTERN)]],
    Meta(max_length=1000, description="Key ids; they take the place of those that it had."),
]
Steers = Annotated[list[SteerField], Meta(min_length=1, max_length=MAX_STEERS)]


class SavePreset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Steering under a name, for the model that is served; one of this name is replaced.

    ``keys`` may ask for it, to ``default_of`` it is applied always; left out, both stay as
    they are.
    """

    name: PresetTitle
    model: str
    steer: Steers
    keys: KeyIds | msgspec.UnsetType = msgspec.UNSET
    default_of: KeyIds | msgspec.UnsetType = msgspec.UNSET


class PresetCard(msgspec.Struct, frozen=True, kw_only=True):
    """A preset as an operator sees it. ``sha256`` is what the record says of its version."""

    name: str
    model: str
    steer: list[SteerField]
    sha256: str
    saved_at: datetime
    saved_by: str
    keys: tuple[str, ...]
    default_of: tuple[str, ...]


class PresetList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[PresetCard, ...]
    fortpoint: wire.Note


class PresetSaved(msgspec.Struct, frozen=True, kw_only=True):
    saved: str
    sha256: str
    fortpoint: wire.Note


class PresetRemoved(msgspec.Struct, frozen=True, kw_only=True):
    removed: str
    fortpoint: wire.Note


class Applied(NamedTuple):
    """A preset of this request."""

    use: PresetUse
    steers: tuple[Steer, ...]


_decoder: msgspec.json.Decoder[list[SteerField]] = msgspec.json.Decoder(Steers)


async def applied(
    book: Presets, principal: Principal, asked: str | None, model: Description
) -> tuple[Applied, ...]:
    """The presets of a request, the key's default first.

    Raises ``InvalidRequest`` for a name that this key does not have, ``PresetUnavailable``.
    """
    default = await book.default_of(principal.key_id)
    found = [] if default is None else [default]
    if asked is not None and asked not in {preset.name for preset in found}:
        found.append(await _asked_for(book, principal, asked))
    return tuple(_applied(preset, principal, model) for preset in found)


def steered(presets: Sequence[Applied], wanted: _S) -> _S:
    """``wanted`` with the presets' steers before its own. Raises ``InvalidRequest``."""
    if not presets:
        return wanted
    steers = (*(steer for preset in presets for steer in preset.steers), *wanted.steer)
    if len(steers) > MAX_STEERS:
        raise InvalidRequest(
            f"{len(steers)} changes with those of the presets; at most {MAX_STEERS} can be made",
            param="fortpoint.steer" if isinstance(wanted, Generate) else "steer",
        )
    return msgspec.structs.replace(wanted, steer=steers)


def recorded(asked: WhiteBox, presets: Sequence[Applied]) -> Inside:
    """What the record says of a request's wishes."""
    return Inside(
        presets=tuple(preset.use for preset in presets),
        steers=len(asked.steer or ()),
        stop_when=len(asked.stop_when or ()),
        watch=tuple(asked.watch.dictionaries) if asked.watch else (),
        adapter=asked.adapter,
    )


def made(name: str, model: str, steer: Steers, user: str) -> Preset:
    """A preset as it is kept."""
    return Preset(name, model, msgspec.json.encode(steer), datetime.now(UTC), user)


def read_steers(text: bytes) -> Steers:
    """Steers from JSON that somebody wrote. Raises ``InvalidRequest`` that names the place."""
    try:
        found = _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        what, _, where = str(error).partition(" - at `$")
        place = f"steer{where.rstrip('`')}: " if where else ""
        raise InvalidRequest(f"these are not steers: {place}{what[:200]}", param="steer") from None
    white_box.check(WhiteBox(steer=found))
    return found


async def try_out(engine: Engine, model: Description, steer: Steers, request_id: str) -> None:
    """Have the engine carry the steers out once, on two words.

    Raises ``InvalidRequest`` for names that are not loaded, for what the engine cannot do, and
    for what breaks its activations at once.
    """
    white_box.check_steers(steer, model, "")
    ask = ScoreText(request_id, " it", prompt="Try", steer=white_box.steers(steer))
    try:
        await engine.score(ask)
    except SteeringDiverged:
        raise InvalidRequest(
            "these steers break the model's activations; use less strength", param="steer"
        ) from None
    except InvalidRequest as error:
        error.param = error.param or "steer"
        raise


def parse(body: bytes) -> SavePreset:
    """Raises ``InvalidRequest`` and its like."""
    ask = wire.decode(body, SavePreset)
    white_box.check(WhiteBox(steer=ask.steer))
    return ask


def card(assigned: Assigned) -> PresetCard:
    preset = assigned.preset
    return PresetCard(
        name=preset.name,
        model=preset.model,
        steer=read_steers(preset.steers),
        sha256=preset.sha256,
        saved_at=preset.saved_at,
        saved_by=preset.saved_by,
        keys=assigned.keys,
        default_of=assigned.default_of,
    )


def described(
    preset: Preset, keys: Sequence[str] | None = None, default_of: Sequence[str] | None = None
) -> str:
    """What the record says of saving it."""
    parts = [f"save preset {preset.name} for {preset.model}, sha256 {preset.sha256}"]
    parts += [] if keys is None else [f"for keys {', '.join(keys) or 'none'}"]
    parts += [] if default_of is None else [f"default of {', '.join(default_of) or 'none'}"]
    return "; ".join(parts)


async def _asked_for(book: Presets, principal: Principal, name: str) -> Preset:
    """An operator's key has them all. Others are told of their own names only."""
    is_operator = principal.role == "operator"
    found = await (book.named(name) if is_operator else book.granted(principal.key_id, name))
    if found is not None:
        return found
    if is_operator:
        names = [assigned.preset.name for assigned in await book.list()]
    else:
        names = list(await book.names_of(principal.key_id))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}?" if near else "it has none"
    raise InvalidRequest(f"this key has no such preset; {hint}", param="fortpoint.preset")


def _applied(preset: Preset, principal: Principal, model: Description) -> Applied:
    try:
        steer = read_steers(preset.steers)
        if preset.model != model.model:
            raise InvalidRequest(f"it was made for the model {preset.model}")
        white_box.check_steers(steer, model, "")
    except InvalidRequest as error:
        # What a preset is made of is its operator's business.
        shown = f" ({error.param}: {error.message})" if principal.role == "operator" else ""
        raise PresetUnavailable(
            f"the preset {preset.name} cannot be applied here{shown}; nothing was answered "
            "without it. Its operator can load its features, change it, or take it from the key",
            param="fortpoint.preset",
        ) from None
    return Applied(PresetUse(preset.name, preset.sha256), white_box.steers(steer))
