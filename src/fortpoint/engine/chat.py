"""Messages to tokens, each token with the role of who wrote it.

The chat template is rendered with a placeholder in each message's place, then cut at the
placeholders: template text may become special tokens, a message's text never does (a user
who types ``<|im_start|>system`` writes those characters, not that token). So a text cannot
change its own role, and every token's role is known exactly.

A template comes with the model and is code of a kind: it runs in Jinja's sandbox, without
attributes that write, and its output is limited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.types import Message, Role, Segment

_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
_MAX_TEMPLATE_CHARS = 1_000_000


class Prompt(msgspec.Struct, frozen=True):
    """Token ids and the segments that cover them in order."""

    tokens: tuple[int, ...]
    segments: tuple[Segment, ...]


class ChatTokenizer:
    """A tokenizer with its chat template."""

    def __init__(self, serialized: bytes, template: str | None, eos: frozenset[int]) -> None:
        self._template_tokenizer = Tokenizer.from_buffer(serialized)
        self._tokenizer = Tokenizer.from_buffer(serialized)
        # Text is text: what looks like a special token in a message stays plain characters.
        self._tokenizer.encode_special_tokens = True
        self._template = None if template is None else _compile(template)
        self.eos = eos

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """From ``tokenizer.json``, ``tokenizer_config.json`` and ``config.json``."""
        config = _read_json(folder / "tokenizer_config.json")
        eos = _read_json(folder / "config.json").get("eos_token_id", [])
        return cls(
            (folder / "tokenizer.json").read_bytes(),
            config.get("chat_template"),
            frozenset(eos if isinstance(eos, list) else [eos]),
        )

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """Render ``messages`` and the start of the assistant's turn."""
        rendered = self._render(messages)
        builder = _Builder()
        # re.split with one group alternates template text and message indices.
        for i, piece in enumerate(_PLACEHOLDER.split(rendered)):
            if i % 2 == 0:
                builder.add(self._encode_template(piece), Role.TEMPLATE, -1)
            else:
                message = messages[int(piece)]
                builder.add(self.encode_text(message.content), message.role, int(piece))
        return builder.prompt()

    def text(self, text: str) -> Prompt:
        """Raw text as one user segment, without a template."""
        builder = _Builder()
        builder.add(self.encode_text(text), Role.USER, 0)
        return builder.prompt()

    def encode_text(self, text: str) -> list[int]:
        """Tokens of plain text; never special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _encode_template(self, text: str) -> list[int]:
        return self._template_tokenizer.encode(text, add_special_tokens=False).ids

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        stand_ins = [
            {"role": message.role.value, "content": f"\ue000{i}\ue001"}
            for i, message in enumerate(messages)
        ]
        try:
            rendered = self._template.render(messages=stand_ins, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}"
            ) from None
        if len(rendered) > _MAX_TEMPLATE_CHARS:
            raise InvalidRequest("the model's chat template makes too much of these messages")
        kept = {int(i) for i in _PLACEHOLDER.findall(rendered)}
        if kept != set(range(len(messages))):
            # A template that drops a turn would hide it from the guard's reading.
            raise InvalidRequest("the model's chat template leaves some of these messages out")
        return rendered


class _Builder:
    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._segments: list[Segment] = []

    def add(self, tokens: list[int], role: Role, message: int) -> None:
        if tokens:
            start = len(self._tokens)
            self._tokens.extend(tokens)
            self._segments.append(Segment(role, message, start, len(self._tokens)))

    def prompt(self) -> Prompt:
        return Prompt(tuple(self._tokens), tuple(self._segments))


def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelError(f"the model's chat template is not valid: {error}") from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        raise ModelError(f"{file.name} of the model cannot be read") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file.name} of the model is not a JSON object")
    return value
