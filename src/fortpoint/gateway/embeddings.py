"""/v1/embeddings: the mean over tokens of the last layer's residual stream, normed.

These vectors come from a language model that was not trained to embed: near texts are near,
but do not expect the quality of a model made for retrieval. Nothing is generated, so the
guard does not judge the input.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fortpoint.config import Server
from fortpoint.gateway import limits, wire

OwnDimensions = Annotated[
    Any,
    Meta(
        description="vectors have the model's own width",
        extra_json_schema={"enum": [None]},
    ),
]


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to embed (texts only: token ids are not taken)."""

    model: str
    input: wire.SomeText | Annotated[list[wire.SomeText], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    fortpoint: dict[str, Any] | None = None
    dimensions: OwnDimensions = None


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


def written(ask: EmbeddingsRequest, vectors: Sequence[tuple[float, ...]]) -> list[Embedding]:
    """The vectors in the encoding that was asked for."""
    return [
        Embedding(
            index=index,
            embedding=_base64(vector) if ask.encoding_format == "base64" else vector,
        )
        for index, vector in enumerate(vectors)
    ]


def _base64(vector: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
