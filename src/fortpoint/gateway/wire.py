"""JSON in and out: strict decoding, errors that echo nothing, and what all formats share.

A field that we cannot honour is not ignored. Its type says which values mean "not asked for"
(``enum`` in its JSON Schema) and why the rest is refused (its description), so that decoder,
refusal and OpenAPI document cannot differ. A field that nobody declared is ignored, as
clients send many.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta

from fortpoint.errors import InvalidRequest, Unsupported
from fortpoint.gateway.token_features import PromptTokenFeatures

_T = TypeVar("_T", bound=msgspec.Struct)

_PATH = re.compile(r" - at `(?:key in )?\$(.*?)`$")
_MISSING = re.compile(r"^Object missing required field `(\w+)`")
_UNKNOWN = "Object contains unknown field `"
_BYTE = re.compile(r"\(byte (\d+)\)$")
_KEY = re.compile(rb'"(\w+)"\s*:\s*(?:\[\s*)?-?$')
_NOT_JSON = re.compile(rb"NaN|Infinity")
_SHOWN_NAME = 64
_ECHO = re.compile(r"^Invalid (?:enum )?value .*?(?= - at `|$)", re.DOTALL)

Text = Annotated[str, Meta(extra_json_schema={"pattern": "^[^\\u0000]*$"})]
SomeText = Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": "^[^\\u0000]+$"})]
Nothing = Annotated[
    Any, Meta(description="this server does not have it", extra_json_schema={"enum": [None]})
]


class Audited(msgspec.Struct, frozen=True):
    """Where this exchange stands in the log: `fortpoint audit show INDEX`."""

    index: int
    leaf_hash: str


class Judged(msgspec.Struct, frozen=True):
    """The guard's decision and each detector's highest score (0 to 1)."""

    action: str
    detector: str | None
    scores: dict[str, float]


class Note(msgspec.Struct, frozen=True):
    """Our own part of an answer. ``guard`` is null where nothing was judged.

    ``prompt_features`` (each prompt's tokens) is there only where the request watches.
    """

    request_id: str
    audit: Audited | None = None
    guard: Judged | None = None
    prompt_features: list[list[PromptTokenFeatures]] | msgspec.UnsetType = msgspec.UNSET


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error form, with our own part beside it."""

    error: ErrorDetail
    fortpoint: Note


class UsageCounts(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


_encoder = msgspec.json.Encoder()


def encode(value: object) -> bytes:
    """JSON in UTF-8."""
    return _encoder.encode(value)


def decode(body: bytes, kind: type[_T]) -> _T:
    """A request. Raises ``InvalidRequest`` or ``Unsupported``; the message echoes no input."""
    try:
        body.decode()
        value: _T = _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error), kind) from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:  # msgspec.DecodeError is one
        raise _syntax_error(str(error), body, kind) from None
    refuse_unsupported(value)
    return value


@cache
def _decoder(kind: type[_T]) -> msgspec.json.Decoder[_T]:
    return msgspec.json.Decoder(kind)


def _validation_error(message: str, kind: type[msgspec.Struct]) -> InvalidRequest:
    """``param`` is the path of the wrong field, or of the missing one."""
    if message.startswith(_UNKNOWN):
        return _unknown_field(message, kind)
    found, missing = _PATH.search(message), _MISSING.match(message)
    names = [found[1].lstrip(".")] if found else []
    names += [missing[1]] if missing else []
    public = _ECHO.sub("Value not known here", message)[:300]
    return InvalidRequest(public, param=".".join(filter(None, names)) or None)


def _unknown_field(message: str, kind: type[msgspec.Struct]) -> InvalidRequest:
    """Names the nearest field that is known there. The unknown one may hold anything, also
    what looks like a path."""
    said = message.removeprefix(_UNKNOWN)
    name, _, path = said.rpartition("` - at `$")
    path = path.rstrip("`").lstrip(".")
    if not name or not set(re.sub(r"\[\d+\]", "", path).split(".")) <= _all_fields(kind):
        name, path = said, ""
    known = _struct_at(kind, path).__struct_fields__
    near = difflib.get_close_matches(name[:_SHOWN_NAME], known, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}?" if near else "it takes none"
    return InvalidRequest(f"an unknown field; {hint}", param=path or None)


def _syntax_error(message: str, body: bytes, kind: type[msgspec.Struct]) -> InvalidRequest:
    """Not JSON. ``NaN`` and ``Infinity`` are what clients' own libraries write there."""
    at = _BYTE.search(message)
    before = body[max(0, int(at[1]) - _SHOWN_NAME) : int(at[1])] if at else b""
    if at and (key := _KEY.search(before)) and _NOT_JSON.match(body, int(at[1])):
        name = key[1].decode()
        param = name if name in _all_fields(kind) else None
        return InvalidRequest("NaN and Infinity are not numbers in JSON", param=param)
    return InvalidRequest("the body is not valid JSON")


@cache
def _all_fields(kind: type[msgspec.Struct]) -> frozenset[str]:
    """Names of all fields at any depth."""
    names = set(kind.__struct_fields__)
    for hint in get_type_hints(kind).values():
        for inner in _structs_in(hint):
            names |= _all_fields(inner)
    return frozenset(names)


def _struct_at(kind: type[msgspec.Struct], path: str) -> type[msgspec.Struct]:
    """The struct that stands at a path such as ``fortpoint.steer[0].when``."""
    for name in filter(None, path.split(".")):
        hint = get_type_hints(kind).get(name.partition("[")[0])
        kind = next(_structs_in(hint), kind)
    return kind


def _structs_in(hint: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for inner in get_args(hint):
        yield from _structs_in(inner)


def refuse_unsupported(value: msgspec.Struct) -> None:
    """Raise ``Unsupported`` for the first field that asks for what we do not have."""
    for name, (neutral, why) in _refused_fields(type(value)).items():
        given = getattr(value, name)
        if not any(_equal(given, allowed) for allowed in neutral):
            raise Unsupported(f"{name} is not supported: {why}", param=name)


@cache
def _refused_fields(kind: type[msgspec.Struct]) -> dict[str, tuple[list[Any], str]]:
    """Fields typed ``Any`` whose schema lists their neutral values."""
    fields = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for meta in get_args(hint)[1:]:
            schema = meta.extra_json_schema if isinstance(meta, Meta) else None
            if schema and "enum" in schema:
                fields[name] = (schema["enum"], meta.description or "")
    return fields


def _equal(given: object, allowed: object) -> bool:
    """JSON's equality: 0 is 0.0 but not false."""
    return given == allowed and isinstance(given, bool) == isinstance(allowed, bool)
