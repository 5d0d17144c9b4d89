"""A secret cut over tokens is one: it leaves as ``[redacted]``, or the answer ends before it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asking import CHAT, TEXT, chat, events, permit, text
from fakes import OPERATOR, Bench, FakeGuard, Script, in_process
from fortpoint.config import Guard as GuardConfig
from fortpoint.engine.protocol import Finished, Token
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.hold_back import HoldBack
from fortpoint.guard.guard import Guard
from fortpoint.types import Found, Reading, Review, Role, Score
from test_guard_answer import CANARY, SECRET

_CLEAN = tuple(f" clean{number}" for number in range(30))
_END = tuple(f" after{number}" for number in range(30))
_BEFORE = "".join(_CLEAN) + " it is "
_CANARIES = {"env:CANARY": CANARY}


def _cut(secret: str, n: int = 3) -> tuple[str, ...]:
    return tuple(secret[at : at + n] for at in range(0, len(secret), n))


def _bench(secret: str, **guard: object) -> Bench:
    """The real guard over texts alone, before a model that tells ``secret``."""
    bench = Bench()
    config = msgspec.structs.replace(bench.config.guard, probes=False, **guard)
    bench.config = msgspec.structs.replace(bench.config, guard=config)
    bench.guard = Guard.load(config, canaries=_CANARIES)  # type: ignore[assignment]
    bench.engine.script = Script(tokens=(*_CLEAN, " it", " is", " ", *_cut(secret), ".", *_END))
    return bench


async def _said(bench: Bench, **more: object) -> tuple[str, str, Any]:
    """Text, finish reason and the whole body of a streamed answer."""
    async with in_process(bench, OPERATOR) as client:
        response = await client.post(CHAT, json=chat(stream=True, **more))
        chunks = events(response)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    said = "".join(choice["delta"].get("content", "") for choice in choices)
    return said, choices[-1]["finish_reason"], response.text


async def test_secret_cut_over_tokens_leaves_as_redacted() -> None:
    bench = _bench(SECRET)
    said, reason, whole = await _said(bench)

    assert said == _BEFORE + "[redacted]." + "".join(_END)
    assert reason == "stop"
    assert not any(piece in whole for piece in _cut(SECRET, 6))
    verdict = bench.audit.entries[0].verdict
    assert verdict is not None
    assert (verdict.action, verdict.detector) == ("redact", "secret")


@pytest.mark.parametrize("window", [1, 2, 64])
async def test_secret_longer_than_the_window_waits_until_it_is_known(window: int) -> None:
    said, _, whole = await _said(_bench(SECRET, hold_back_tokens=window))

    assert "it is [redacted]." in said
    assert not any(piece in whole for piece in _cut(SECRET, 6))


async def test_secret_in_a_whole_answer_is_redacted_too() -> None:
    async with in_process(_bench(SECRET)) as client:
        answer = (await client.post(TEXT, json=text())).json()["choices"][0]

    assert "it is [redacted]." in answer["text"]
    assert answer["finish_reason"] == "stop"


async def test_secret_that_blocks_ends_the_answer_before_it() -> None:
    said, reason, whole = await _said(_bench(SECRET, secrets="block"))

    assert reason == "content_filter"
    assert _BEFORE.startswith(said)
    assert SECRET[:6] not in whole


async def test_secret_that_is_only_flagged_leaves_and_is_in_the_record() -> None:
    bench = _bench(SECRET, secrets="flag")
    said, reason, _ = await _said(bench)

    assert (SECRET in said, reason) == (True, "stop")
    verdict = bench.audit.entries[0].verdict
    assert verdict is not None
    assert (verdict.action, verdict.detector) == ("flag", "secret")


@pytest.mark.parametrize("told", [CANARY, CANARY.upper(), " ".join(CANARY), CANARY[::-1]])
async def test_canary_ends_the_answer_before_it_in_any_plain_disguise(told: str) -> None:
    bench = _bench(told)
    said, reason, _ = await _said(bench)

    assert reason == "content_filter"
    assert _BEFORE.startswith(said)
    verdict = bench.audit.entries[0].verdict
    assert verdict is not None
    assert (verdict.action, verdict.detector) == ("block", "canary")
    assert CANARY not in msgspec.json.encode(bench.audit.entries[0]).decode()


async def test_secrets_tokens_show_no_logprobs_and_those_around_stay_aligned() -> None:
    bench = _bench(SECRET)
    permit(bench, logprobs=True)
    async with in_process(bench) as client:
        ask = chat(logprobs=True, top_logprobs=2)
        answer = (await client.post(CHAT, json=ask)).json()["choices"][0]
        shown = [one["token"] for one in answer["logprobs"]["content"]]

    assert shown == [*_CLEAN, " it", " is", " ", ".", *_END]


async def test_secrets_tokens_in_a_streamed_completion_keep_the_offsets() -> None:
    bench = _bench(SECRET)
    permit(bench, logprobs=True)
    async with in_process(bench) as client:
        chunks = events(await client.post(TEXT, json=text(stream=True, logprobs=1)))
    pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["text"]]

    at = 0
    for piece in pieces:
        assert piece["logprobs"]["tokens"] == [piece["text"]]
        assert piece["logprobs"]["text_offset"] == [at]
        at += len(piece["text"])
    assert SECRET[:6] not in json.dumps(chunks)


class _Planned:
    """Knows the whole answer from the start: where things will be found, and when that is sure."""

    def __init__(self, found: list[Found], sure: int) -> None:
        self._found = found
        self._sure = sure
        self._n = 0

    def add(self, text: str, reading: Reading | None) -> None:
        self._n += len(text)

    def review(self, *, final: bool) -> Review:
        settled = self._n if final else max(self._n - self._sure, 0)
        found = tuple(one for one in self._found if one.end <= settled)
        starts = [one.start for one in self._found if one.end > settled and one.start < settled]
        score = Score("secret", float(bool(found)), 0.5, Role.ASSISTANT, bool(found))
        return Review((score,), found, min([settled, *starts]))


def _exchange(window: int) -> Exchange:
    bench = Bench(guard=FakeGuard())
    guard = GuardConfig(hold_back_tokens=window)
    bench.config = msgspec.structs.replace(bench.config, guard=guard)
    return Exchange(bench.services(), CHAT, True)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.lists(st.integers(0, 30), max_size=4, unique=True),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 4),
)
def test_hold_back_any_tokens_and_findings_lose_nothing_else_and_show_nothing_of_them(
    sizes: list[int], starts: list[int], length: int, window: int, lag: int
) -> None:
    whole = "".join(chr(0x4E00 + number) for number in range(sum(sizes)))
    spans: list[Found] = []
    for start in sorted(one * 5 for one in starts):
        if start + length <= len(whole) and (not spans or spans[-1].end <= start):
            spans.append(Found(start, start + length, "secret"))
    hold = HoldBack(_exchange(window), _Planned(spans, length), lag)
    left: list[Token] = []
    at = 0
    for size in sizes:
        piece = whole[at : at + size]
        at += size
        left += [e for e in hold.take(Token("r", 0, piece, piece, -1.0)) if isinstance(e, Token)]
    *tokens, end = hold.take(Finished("r", 0, "stop"))
    left += [token for token in tokens if isinstance(token, Token)]

    expected, at = "", 0
    for span in spans:
        expected += whole[at : span.start] + "[redacted]"
        at = span.end
    assert "".join(token.text for token in left) == expected + whole[at:]
    assert isinstance(end, Finished)
    hidden = {char for span in spans for char in whole[span.start : span.end]}
    assert not hidden & set("".join(token.token or "" for token in left))
