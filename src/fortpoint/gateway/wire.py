"""JSON in and out: strict decoding, errors that echo nothing, and what all formats share.

A field that we cannot honour is not ignored. Its type says which values mean "not asked for"
(``enum`` in its JSON Schema) and why the rest is refused (its description), so that decoder,
refusal and OpenAPI document cannot differ. A field that nobody declared is ignored, as
clients send many.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta

from fortpoint.errors import InvalidRequest, Unsupported

_T = TypeVar("_T", bound=msgspec.Struct)

_PATH = re.compile(r" - at `(?:key in )?\$(.*?)`$")
_MISSING = re.compile(r"^Object missing required field `(\w+)`")
_ECHO = re.compile(r"^Invalid (?:enum )?value .*?(?= - at `|$)", re.DOTALL)

_INT64 = 2**63

SEED = Meta(ge=-_INT64, le=_INT64 - 1)
Text = Annotated[str, Meta(extra_json_schema={"pattern": "^[^\\u0000]*$"})]
SomeText = Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": "^[^\\u0000]+$"})]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=4)] | None
Temperature = Annotated[float, Meta(ge=0, le=2)] | None
TopP = Annotated[float, Meta(ge=0, le=1)] | None
MaxTokens = Annotated[int, Meta(ge=1, le=10_000_000)] | None
N = Annotated[int, Meta(ge=1, le=64)] | None
Seed = Annotated[int, SEED] | None


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


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
    """Our own part of an answer. ``guard`` is null where nothing was judged."""

    request_id: str
    audit: Audited | None = None
    guard: Judged | None = None


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
        raise _validation_error(str(error)) from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError:  # msgspec.DecodeError is one
        raise InvalidRequest("the body is not valid JSON") from None
    refuse_unsupported(value)
    return value


@cache
def _decoder(kind: type[_T]) -> msgspec.json.Decoder[_T]:
    return msgspec.json.Decoder(kind)


def _validation_error(message: str) -> InvalidRequest:
    """``param`` is the path of the wrong field, or of the missing one."""
    found, missing = _PATH.search(message), _MISSING.match(message)
    names = [found[1].lstrip(".")] if found else []
    names += [missing[1]] if missing else []
    public = _ECHO.sub("Value not known here", message)[:300]
    return InvalidRequest(public, param=".".join(filter(None, names)) or None)


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
