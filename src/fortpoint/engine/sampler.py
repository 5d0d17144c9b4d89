"""Choose the next token from logits."""

from __future__ import annotations

import secrets
from typing import Protocol

import torch
from torch import Tensor

_TOP_P_CANDIDATES = 1024


class Rule(Protocol):
    """The part of ``protocol.Sampling`` that matters here."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_p(self) -> float: ...


def generator(seed: int | None, choice: int) -> torch.Generator:
    """A source of randomness of one answer: the same seed and choice give the same answer."""
    made = torch.Generator()
    base = secrets.randbits(63) if seed is None else seed
    made.manual_seed((base + choice * 0x9E3779B97F4A7C15) % 2**63)
    return made


def sample(logits: Tensor, rule: Rule, source: torch.Generator) -> int:
    """One token id. ``logits`` is ``[vocab]``; temperature 0 takes the largest.

    ``top_p`` keeps the smallest set of tokens whose probabilities sum to at least it
    (nucleus sampling, arXiv 1904.09751).
    """
    if rule.temperature <= 0.0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / rule.temperature, dim=-1)
    if rule.top_p >= 1.0:
        return int(torch.multinomial(probabilities, 1, generator=source))
    values, indices = torch.topk(probabilities, min(_TOP_P_CANDIDATES, len(probabilities)))
    if float(values.sum()) < rule.top_p:  # a flat distribution: sort it all
        values, indices = torch.sort(probabilities, descending=True)
    before = torch.cumsum(values, 0) - values
    kept = torch.where(before < rule.top_p, values, 0.0)
    return int(indices[torch.multinomial(kept, 1, generator=source)])
