"""/embeddings of an upstream: texts out, vectors back, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from fortpoint.config import Upstream
from fortpoint.engine.protocol import Embedded
from fortpoint.engine.upstream import wire
from fortpoint.errors import EngineError
from fortpoint.types import Usage

_MAX_WIDTH = 65_536


class _Item(msgspec.Struct, frozen=True):
    index: Annotated[int, Meta(ge=0)]
    embedding: Annotated[tuple[float, ...], Meta(min_length=1, max_length=_MAX_WIDTH)]


class _List(msgspec.Struct, frozen=True):
    data: list[_Item]
    usage: wire.UpstreamUsage | None = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_List)


def ask(texts: Sequence[str], config: Upstream) -> bytes:
    model = config.embedding_model or config.model
    return _encoder.encode({"model": model, "input": list(texts), "encoding_format": "float"})


def read(body: bytes, texts: Sequence[str]) -> Embedded:
    """One vector for each text, all of one width. Raises ``EngineError``."""
    answer: _List = wire.decode(_decoder, body)
    vectors = {item.index: item.embedding for item in answer.data}
    widths = {len(vector) for vector in vectors.values()}
    whole = len(answer.data) == len(texts) and set(vectors) == set(range(len(texts)))
    if not whole or len(widths) != 1:
        raise EngineError("an upstream server's vectors do not fit the texts")
    if not all(math.isfinite(value) for vector in vectors.values() for value in vector):
        raise EngineError("an upstream server's vectors hold what is not a number")
    usage = Usage(sum(wire.about(text) for text in texts), estimated=True)
    if answer.usage is not None:
        usage = Usage(answer.usage.prompt_tokens)
    return Embedded("upstream", usage, tuple(vectors[index] for index in range(len(texts))))
