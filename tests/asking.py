"""Requests to the gateway and their streamed answers, as the gateway's tests write them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec

from fakes import MODEL, Bench
from fortpoint.config import Extraction

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def chat(content: object = "Name a bridge.", **more: object) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}


def text(prompt: object = "The Golden", **more: object) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **more}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    *chunks, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error, in form."""
    body = response.json()
    assert response.status_code == status, response.text
    assert body["error"]["code"] == code
    error: dict[str, Any] = body["error"]
    return error


def permit(bench: Bench, **extraction: object) -> None:
    """Give every key what the extraction policy keeps back."""
    bench.config = msgspec.structs.replace(
        bench.config, extraction=msgspec.structs.replace(Extraction(), **extraction)
    )
