"""Secrets are known by their form and by the checks that they carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortpoint.guard.rules.finding import Finding, disjoint, redact
from fortpoint.guard.rules.secrets import KINDS, find_secrets

_RANDOM = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hJ6kL9nP2rS5uV8xY1zA4"
_SECRETS = {
    "fortpoint_key": "sk-fp-abcdefgh2345-" + _RANDOM[:43],
    "aws_access_key": "AKIA" + "IOSFODNN7EXAMPLE",
    "google_api_key": "AIza" + _RANDOM[:35],
    "google_oauth_token": "ya29." + _RANDOM,
    "google_client_secret": "GOCSPX-" + _RANDOM[:28],
    "github_token": "ghp_" + _RANDOM[:36],
    "gitlab_token": "glpat-" + _RANDOM[:20],
    "slack_token": "xoxb-" + "123456789012-" + _RANDOM[:24],
    "slack_webhook": "hooks.slack.com/services/T0001/B0001/" + _RANDOM[:24],
    "stripe_key": "sk_live_" + _RANDOM[:24],
    "stripe_webhook_secret": "whsec_" + _RANDOM[:32],
    "huggingface_token": "hf_" + _RANDOM[:34],
    "npm_token": "npm_" + _RANDOM[:36],
    "package_index_token": "pypi-AgE" + _RANDOM + _RANDOM,
    "age_secret_key": "AGE-SECRET-KEY-1" + (_RANDOM + _RANDOM)[:58].upper(),
    "sendgrid_key": "SG." + _RANDOM[:22] + "." + _RANDOM[:43],
    "api_key": "sk-proj-" + _RANDOM[:40],
    "private_key": "-----BEGIN PRIVATE KEY-----\\n" + _RANDOM * 3 + "\\n-----END PRIVATE KEY-----",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0." + _RANDOM[:43],
    "card_number": "4111-1111-1111-1111",
    "iban": "GB82 WEST 1234 5698 7654 32",
}


def _kinds(text: str) -> set[str]:
    return {finding.kind for finding in find_secrets(text)}


@pytest.mark.parametrize("kind", _SECRETS)
def test_find_secrets_each_kind_is_found_and_leaves_nothing(kind: str) -> None:
    secret = _SECRETS[kind]
    text = f"Use {secret}, please."
    findings = find_secrets(text)
    assert kind in {finding.kind for finding in findings}
    assert redact(text, findings) == f"Use [{disjoint(findings)[0].kind}], please."


def test_find_secrets_every_kind_has_a_case() -> None:
    assert {kind.name for kind in KINDS} == {
        *_SECRETS,
        "connection_password",
        "assigned_secret",
    }


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgres://bob:s3cr3t9@db/x", "postgres://bob:[connection_password]@db/x"),
        ("redis://:s3cr3t9@db", "redis://:[connection_password]@db"),
        ("mongodb+srv://u:p4ssw@c.example", "mongodb+srv://u:[connection_password]@c.example"),
        ('password="hX8$kd92Lq1"', 'password="[assigned_secret]"'),
        ("DB_PASSWORD: hX8$kd92Lq1\n", "DB_PASSWORD: [assigned_secret]\n"),
        ('{"api_key": "0f9a8b7c6d5e4f3a"}', '{"api_key": "[assigned_secret]"}'),
        ("4111111111111111 12/27", "[card_number] 12/27"),
        ("5500 0000 0000 0004 4111 1111 1111 1111", "[card_number] [card_number]"),
        ("2345 4111 1111 1111 1111", "2345 [card_number]"),
        ("DE89370400440532013000 today", "[iban] today"),
    ],
)
def test_redact_only_the_secret_part_goes(text: str, redacted: str) -> None:
    assert redact(text, find_secrets(text)) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sk-learn-something-with-a-long-name",
        "password = os.environ['DB_PASSWORD_1']",
        "password: your_password_123",
        "postgres://user:password@localhost/db",
        "https://example.com:8080/@user",
        "the token is a word of the vocabulary",
        "4111 1111 1111 1112",
        "1234567890123456",
        "DE89 3704 0044 0532 0130 01",
        "commit 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
        "550e8400-e29b-41d4-a716-446655440000",
        "-----BEGIN CERTIFICATE-----\n" + _RANDOM * 3 + "\n-----END CERTIFICATE-----",
        "-----BEGIN PRIVATE KEY----- is how such a file starts",
        "3.14159265358979323846264338327950288",
        "tel. +41 44 668 18 00, fax 044 668 18 01",
    ],
)
def test_find_secrets_ordinary_text_has_none(text: str) -> None:
    assert find_secrets(text) == ()


@given(st.text())
def test_find_secrets_any_unicode_gives_spans_within(text: str) -> None:
    for finding in find_secrets(text):
        assert 0 <= finding.start < finding.end <= len(text)


@pytest.mark.parametrize(
    "piece",
    ["eyJ", "password=", "4444 ", "DE89 ", "sk-", "http://a:", "AKIA", "-----BEGIN ", "a: \n"],
)
def test_find_secrets_a_megabyte_of_beginnings_is_read(piece: str) -> None:
    assert find_secrets(piece * (1_000_000 // len(piece))) == ()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=6))
def test_redact_overlapping_findings_hide_every_character(spans: list[tuple[int, int]]) -> None:
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    findings = [Finding(start, start + n, "secret", "x", 0.5) for start, n in spans]
    hidden = {i for finding in findings for i in range(finding.start, finding.end)}
    left = redact(text, findings).replace("[x]", "")
    assert left == "".join(char for i, char in enumerate(text) if i not in hidden)
