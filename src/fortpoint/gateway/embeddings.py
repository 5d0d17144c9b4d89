"""/v1/embeddings: the mean over tokens of the last layer's residual stream, normed.

These vectors come from a language model that was not trained to embed: near texts are near,
but do not expect the quality of a model made for retrieval. Nothing is generated, so the
guard notes what it thinks of the texts and refuses none. ``dimensions`` may name the model's own
width and no other: its vectors were not trained to be cut short.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fortpoint.config import Server
from fortpoint.engine.client import Engine
from fortpoint.engine.protocol import Embedded
from fortpoint.errors import EngineError, InvalidRequest, Unsupported
from fortpoint.gateway import limits, wire
from fortpoint.gateway.white_box import NothingInside


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to embed (texts only: token ids are not taken)."""

    model: str
    input: wire.SomeText | Annotated[list[wire.SomeText], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    fortpoint: NothingInside | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector; base64 holds little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: tuple[float, ...] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    fortpoint: wire.Note


def parse(body: bytes, server: Server) -> EmbeddingsRequest:
    """The request, within the server's limits. Raises ``InvalidRequest`` and its like."""
    ask = wire.decode(body, EmbeddingsRequest)
    limits.check_count(len(texts(ask)), server.max_inputs, "input", "texts")
    limits.check_texts(texts(ask), server.max_prompt_bytes, "input")
    return ask


def texts(ask: EmbeddingsRequest) -> list[str]:
    return [ask.input] if isinstance(ask.input, str) else ask.input


async def embedded(engine: Engine, ask: EmbeddingsRequest) -> Embedded:
    """One vector a text. What the engine finds too long gets its field's name."""
    try:
        return await engine.embed(texts(ask))
    except InvalidRequest as error:
        error.param = error.param or "input"
        raise


def written(ask: EmbeddingsRequest, vectors: Sequence[tuple[float, ...]]) -> list[Embedding]:
    """The vectors in the encoding that was asked for.

    Raises ``Unsupported`` for another width than theirs, ``EngineError`` for vectors that are
    not one finite vector a text.
    """
    if len(vectors) != len(texts(ask)):
        raise EngineError("the engine sent another number of vectors than of texts")
    width = len(vectors[0])
    if ask.dimensions not in (None, width):
        raise Unsupported(f"this model's vectors have {width} dimensions", param="dimensions")
    packed = [_packed(vector) for vector in vectors]
    if ask.encoding_format == "base64":
        written = [base64.b64encode(raw).decode() for raw in packed]
        return [Embedding(index=index, embedding=text) for index, text in enumerate(written)]
    return [Embedding(index=index, embedding=vector) for index, vector in enumerate(vectors)]


def _packed(vector: tuple[float, ...]) -> bytes:
    """Little-endian float32."""
    try:
        if all(map(math.isfinite, vector)):
            return struct.pack(f"<{len(vector)}f", *vector)
    except OverflowError:
        pass
    raise EngineError("the engine sent a vector that is not of finite numbers")
