"""Prompts of known length, none used twice: what one engine remembers must help none.

Each begins with a number of its own, so that two prompts share no beginning.

    prompts = Prompts(model_folder)
    for prompt in prompts.short(32):  # of 20 to 65 tokens each
        prompt.text, prompt.tokens
    prompts.of_length(512)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

LINES = tuple(Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Prompt:
    """``tokens`` is what ``text`` becomes without any template."""

    text: str
    tokens: tuple[int, ...]


class Prompts:
    """An endless supply, the same in each run."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._source = random.Random(0)
        self._number = 10_000

    def short(self, n: int, lines: Sequence[int] | None = None) -> list[Prompt]:
        """``n`` prompts, of these lines or of drawn ones: the same lines have the same lengths."""
        lines = self.draw(n) if lines is None else lines
        return [self._prompt(f"{self._next()}. {_text(line)}") for line in lines]

    def draw(self, n: int) -> list[int]:
        """Which lines ``n`` short prompts are made of."""
        return self._source.sample(range(len(LINES)), n)

    def of_length(self, n_tokens: int) -> Prompt:
        """One prompt of exactly ``n_tokens``."""
        while True:
            text = f"{self._next()}."
            while len(ids := self._encode(text)) < n_tokens:
                text += " " + " ".join(self._source.sample(LINES, 4))
            prompt = self._prompt(self._tokenizer.decode(ids[:n_tokens]))
            if len(prompt.tokens) == n_tokens:  # a cut word may be spelt with other tokens
                return prompt

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _prompt(self, text: str) -> Prompt:
        return Prompt(text, tuple(self._encode(text)))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _text(line: int) -> str:
    """Every other line goes with the one before it, so that lengths differ."""
    return LINES[line] if line % 2 else f"{LINES[line - 1]} {LINES[line]}"
