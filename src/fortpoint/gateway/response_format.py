"""``response_format``: an answer held to a JSON Schema, in OpenAI's words.

The schema stays text: the engine compiles it, and this process loads no parser for it. Size
and depth are bounded here, before anything reads it; whether it can be followed the engine says.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from fortpoint.errors import InvalidRequest

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
PARAM = "response_format.json_schema.schema"

_ANY_OBJECT = '{"type":"object"}'
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Plain text, as without it."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True, kw_only=True):
    """``schema`` has at most 64 KiB and 64 levels. It is always followed exactly, so
    ``strict`` changes nothing."""

    name: Annotated[str, Meta(max_length=64)] | None = None
    description: str | None = None
    schema: Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "object"})]
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that satisfies a schema."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | None


def schema_of(asked: ResponseFormat) -> str | None:
    """The text of the schema to follow. Raises ``InvalidRequest`` for one beyond the limits."""
    if isinstance(asked, JsonObjectFormat):
        return _ANY_OBJECT
    if not isinstance(asked, JsonSchemaFormat):
        return None
    schema = bytes(asked.json_schema.schema).strip()
    if len(schema) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"the schema is larger than {MAX_SCHEMA_BYTES} bytes", param=PARAM)
    if not schema.startswith(b"{"):
        raise InvalidRequest("the schema is not a JSON object", param=PARAM)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(
            f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=PARAM
        )
    return schema.decode()


def _depth(text: bytes) -> int:
    """The most brackets that are open at once in valid JSON."""
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        if token[0] in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token[0] in b"]}":
            depth -= 1
    return deepest
