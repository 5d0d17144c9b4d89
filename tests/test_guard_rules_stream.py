"""A secret is found wherever it stands, and none of it leaves a stream before it is decided."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fortpoint.guard.rules.canary import Canaries
from fortpoint.guard.rules.finding import Finding, disjoint, redact
from fortpoint.guard.rules.secrets import find_secrets
from fortpoint.guard.rules.stream import MAX_HELD, SecretScanner

CANARY = "harbour-4711-lantern"
CANARIES = Canaries({"prompt": CANARY})
AWS = "AKIA" + "IOSFODNN7EXAMPLE"
GITHUB = "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789"
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n"
    + ("MIIEpAIBAAKCAQEA7bq0123456789abcdefghijklmnopqrstuvwxyz/+ABC\n" * 20)
    + "-----END RSA PRIVATE KEY-----"
)
SECRETS = (
    AWS,
    GITHUB,
    PEM,
    "postgres://bob:s3cr3t9pw@db",
    'password = "hX8$kd92Lq1"',
    "4111 1111 1111 1111 5500 0000 0000 0004",
    "DE89 3704 0044 0532 0130 00",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghij_-KLMNOP",
    CANARY,
)
FILLERS = ("The key is ", " and ", "\n", "4", "AKIA", "-----BEGIN ", "http://", "sk-", " pass")


def _expected(text: str) -> tuple[Finding, ...]:
    return disjoint([*find_secrets(text), *CANARIES.find(text)])


def _streamed(text: str, cuts: list[int], *, marks: bool) -> tuple[str, tuple[Finding, ...]]:
    scanner = SecretScanner(CANARIES, marks=marks)
    out, findings = "", []
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        released = scanner.feed(text[start:end])
        out += released.text
        findings += released.findings
    released = scanner.flush()
    return out + released.text, (*findings, *released.findings)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(SECRETS + FILLERS) | st.text(max_size=6), max_size=6),
    st.lists(st.integers(0, 5000), max_size=12),
)
def test_stream_cut_anywhere_finds_what_the_whole_text_has(
    parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    expected = _expected(text)
    released, findings = _streamed(text, cuts, marks=True)
    assert findings == expected
    assert released == redact(text, expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(SECRETS + FILLERS), max_size=5), st.lists(st.integers(0, 5000)))
def test_stream_released_text_and_spans_are_the_whole(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    released, findings = _streamed(text, cuts, marks=False)
    rebuilt, at, taken = "", 0, 0
    for finding in findings:
        n = finding.start - at
        rebuilt += released[taken : taken + n] + text[finding.start : finding.end]
        at, taken = finding.end, taken + n
    assert rebuilt + released[taken:] == text


@pytest.mark.parametrize("secret", SECRETS)
def test_stream_by_single_characters_releases_nothing_of_a_secret(secret: str) -> None:
    text = f"Here: {secret} end."
    expected = _expected(text)
    hidden = {i for finding in expected for i in range(finding.start, finding.end)}
    assert expected
    scanner = SecretScanner(CANARIES)
    out = "".join(scanner.feed(char).text for char in text) + scanner.flush().text
    assert out == "".join(char for i, char in enumerate(text) if i not in hidden)


def test_stream_ordinary_text_waits_for_few_characters() -> None:
    scanner = SecretScanner(CANARIES)
    held = 0
    for char in "The quick brown fox jumped over the lazy dog, at 10:30, for 25 euros. " * 5:
        scanner.feed(char)
        held = max(held, scanner.n_held)
    assert held <= 8


@pytest.mark.parametrize(
    "piece", ["h ", "\u200b", "4", "A", "-----BEGIN PRIVATE KEY-----\n", "eyJ", "a: b\n"]
)
def test_stream_endless_beginning_is_held_within_its_bound(piece: str) -> None:
    scanner = SecretScanner(CANARIES)
    scanner.feed("harb")
    for _ in range(40):
        scanner.feed(piece * (4000 // len(piece)))
        assert scanner.n_held <= MAX_HELD


def test_released_says_where_the_secret_begins() -> None:
    scanner = SecretScanner()
    scanner.feed("one ")
    released = scanner.feed(f"two {AWS} three. ")
    assert released.text == "two  three. "
    assert released.findings[0].kind == "aws_access_key"
    assert released.findings[0].start == 8
