"""Secrets in a text: keys of known makers, private keys, passwords in addresses, cards, IBANs.

    find_secrets("my key is AKIAIOSFODNN7EXAMPLE")   # (Finding(10, 30, 'secret', ...),)

Each kind is a pattern of limited length and, where the form alone says too little, a check of
what matched: a digit sum, a country's length, how random a value looks. Text is read once for
each kind whose anchor is in it, so time is linear in the text.

Does not find: a secret without form (a plain word as a password in a sentence), one that was
encoded first, or one with something put between its characters.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fortpoint.guard.rules.finding import Finding
from fortpoint.guard.rules.numbers import accept_card, accept_iban
from fortpoint.guard.rules.pattern import (
    Piece,
    chars,
    either,
    literal,
    maybe,
    repeated,
    sequence,
    words,
)

DETECTOR = "secret"

# From what matched to the part that is secret, relative to the match; None when it is none.
Accept = Callable[[str], tuple[int, int] | None]


class Match(NamedTuple):
    """A finding, and where the text begins that made it one (``password = `` is no secret)."""

    first: int
    finding: Finding


_WORD = "A-Za-z0-9"
_URLSAFE = r"A-Za-z0-9_\-"


@dataclass(frozen=True)
class SecretKind:
    """One kind. ``anchors`` are lower-case texts of which each match has one."""

    name: str
    score: float
    piece: Piece
    anchors: tuple[str, ...]
    before: str = rf"(?<![{_WORD}])"
    after: str = ""
    accept: Accept | None = None

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.before + self.piece.full + self.after)

    @property
    def begun(self) -> str:
        """A regular expression for what may yet become one, up to the end of the text."""
        return self.before + self.piece.begun

    def find(self, text: str, start: int) -> Iterator[Match]:
        at = start
        while (match := self.regex.search(text, at)) is not None:
            span = (0, len(match[0])) if self.accept is None else self.accept(match[0])
            first = match.start()
            if span is None:
                at = first + 1
                continue
            at = first + span[1]
            yield Match(first, Finding(first + span[0], at, DETECTOR, self.name, self.score))


def matches(text: str, start: int = 0) -> tuple[Match, ...]:
    """All kinds' matches that begin at ``start`` or later; what is before is only looked at."""
    lower = text.lower()
    return tuple(
        match
        for kind in KINDS
        if any(anchor in lower for anchor in kind.anchors)
        for match in kind.find(text, start)
    )


def find_secrets(text: str) -> tuple[Finding, ...]:
    """Every secret, in order. Two kinds may name the same characters."""
    return tuple(sorted(match.finding for match in matches(text)))


def entropy_bits(text: str) -> float:
    """Shannon entropy of its characters, in bits a character."""
    n = len(text)
    return -math.fsum(c / n * math.log2(c / n) for c in Counter(text).values())


def _accept_random(text: str) -> tuple[int, int] | None:
    """A whole token, when it has digits and letters in no order that a name would have."""
    mixed = re.search(r"[0-9]", text) and re.search(r"[A-Za-z]", text)
    return (0, len(text)) if mixed and entropy_bits(text) >= 3.5 else None


_PLACEHOLDER = re.compile(
    r"(?i)pass(word|wd)?|secret|changeme|example|placeholder|redacted|your|user(name)?|\.\.\.|xxx|"
    r"\*\*\*|<|\$\{|\{\{|%[sd(]|getenv|environ|process\.env|config[.\[]|null|none|true|false"
)


def _accept_password(text: str) -> tuple[int, int] | None:
    """The password in ``scheme://user:password@``."""
    end = len(text) - 1
    start = text.index(":", text.index("://") + 3) + 1
    held = _PLACEHOLDER.match(text, start, end)
    return None if held is not None else (start, end)


_OPERATOR = re.compile(r"""["']?\s*(?::=|=>|=|:)\s*["'`]?""")


def _accept_assigned(text: str) -> tuple[int, int] | None:
    """The value after ``name =``, when it looks drawn at random."""
    operator = _OPERATOR.search(text)
    if operator is None:
        return None
    value = text[operator.end() :]
    random = len(value) >= 8 and re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value)
    if not random or _PLACEHOLDER.search(value) or entropy_bits(value) < 3.0:
        return None
    return operator.end(), len(text)


def _token(name: str, prefix: Piece, body: Piece, *anchors: str) -> SecretKind:
    """A maker's token: a prefix that nothing else has, and random characters."""
    return SecretKind(name, 0.99, sequence(prefix, body), anchors)


def _either_literal(*texts: str) -> Piece:
    return either(*(literal(text) for text in texts))


_HEADER_LINE = sequence(
    chars(r"A-Za-z\-", 1, 32), literal(": "), chars(r"^\n", 0, 128), literal("\n")
)
_BREAK = chars(r"\s\\nr", 0, 16)
_PEM = sequence(
    literal("-----BEGIN "),
    chars("A-Z0-9 ", 0, 32),
    literal("-----"),
    _BREAK,
    repeated(_HEADER_LINE, 0, 4),
    _BREAK,
    chars("A-Za-z0-9+/=", 24, 8192),
    chars(r"A-Za-z0-9+/=\s\\", 0, 8192),
    maybe(sequence(literal("-----END "), chars("A-Z0-9 ", 0, 32), literal("-----"))),
)


def _accept_private(text: str) -> tuple[int, int] | None:
    """A PEM block of a private key; certificates and public keys may be seen."""
    return (0, len(text)) if "PRIVATE KEY" in text[:64] else None


_JWT = sequence(
    literal("eyJ"),
    chars(_URLSAFE, 8, 4096),
    literal(".eyJ"),
    chars(_URLSAFE, 4, 4096),
    literal("."),
    chars(_URLSAFE, 8, 1024),
)
_CONNECTION = sequence(
    words(
        *("postgres", "postgresql", "mysql", "mariadb", "mongodb", "redis", "rediss", "amqp"),
        *("amqps", "http", "https", "ftp", "sftp", "ssh", "smtp", "smtps", "ldap", "ldaps"),
        *("mssql", "sqlserver", "oracle", "clickhouse", "nats", "kafka", "git"),
    ),
    maybe(sequence(literal("+"), chars("A-Za-z0-9", 1, 16))),
    literal("://"),
    chars(r"""^\s:/?#@"'<>\[\]""", 0, 64),
    literal(":"),
    chars(r"""^\s/@"'<>""", 3, 128),
    literal("@"),
)
_NAMES = words(
    *("password", "passwd", "passphrase", "pwd", "secret", "token", "credential", "apikey"),
    *("api_key", "api-key", "accesskey", "access_key", "access-key", "accountkey", "account_key"),
    *("privatekey", "private_key", "secretkey", "secret_key", "encryption_key", "signing_key"),
)
_ASSIGNED = sequence(
    _NAMES,
    chars(r"""\s"'""", 0, 4),
    either(literal(":="), literal("=>"), literal("="), literal(":")),
    chars(r"""\s"'`""", 0, 4),
    chars(r"""^\s"'`,;<>(){}""", 8, 256),
)
_CARD = sequence(
    chars("2-6", 1, 1),
    chars("0-9", 3, 3),
    repeated(sequence(chars(" -", 0, 1), chars("0-9", 1, 1)), 8, 15),
)
_IBAN = sequence(
    chars("A-Z", 2, 2),
    chars("0-9", 2, 2),
    repeated(sequence(chars(" ", 0, 1), chars("A-Z0-9", 1, 1)), 11, 30),
)
_DIGITS = tuple("23456")

KINDS: tuple[SecretKind, ...] = (
    _token("fortpoint_key", literal("sk-fp-"), chars(_URLSAFE, 24, 128), "sk-fp-"),
    SecretKind(
        "aws_access_key",
        0.99,
        sequence(_either_literal("AKIA", "ASIA", "ABIA", "ACCA"), chars("A-Z0-9", 16, 16)),
        ("akia", "asia", "abia", "acca"),
        after=f"(?![{_WORD}])",
    ),
    _token("google_api_key", literal("AIza"), chars(_URLSAFE, 35, 35), "aiza"),
    _token("google_oauth_token", literal("ya29."), chars(_URLSAFE + ".", 20, 512), "ya29."),
    _token("google_client_secret", literal("GOCSPX-"), chars(_URLSAFE, 24, 64), "gocspx-"),
    _token(
        "github_token",
        sequence(literal("gh"), chars("pousr", 1, 1), literal("_")),
        chars(_WORD, 30, 255),
        *("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    ),
    _token("github_token", literal("github_pat_"), chars(r"A-Za-z0-9_", 22, 255), "github_pat_"),
    _token("gitlab_token", literal("glpat-"), chars(_URLSAFE, 20, 64), "glpat-"),
    _token(
        "slack_token",
        sequence(_either_literal("xox", "xapp"), chars("abeprs", 0, 1), literal("-")),
        chars(_WORD + "-", 20, 255),
        *("xox", "xapp-"),
    ),
    _token(
        "slack_webhook",
        literal("hooks.slack.com/services/"),
        chars("A-Za-z0-9/", 30, 96),
        "hooks.slack.com",
    ),
    _token(
        "stripe_key",
        sequence(_either_literal("sk", "rk"), _either_literal("_live_", "_test_")),
        chars(_WORD, 16, 255),
        *("k_live_", "k_test_"),
    ),
    _token("stripe_webhook_secret", literal("whsec_"), chars("A-Za-z0-9+/=", 32, 64), "whsec_"),
    _token("huggingface_token", literal("hf_"), chars(_WORD, 30, 64), "hf_"),
    _token("npm_token", literal("npm_"), chars(_WORD, 36, 36), "npm_"),
    _token("package_index_token", literal("pypi-AgE"), chars(_URLSAFE, 50, 512), "pypi-age"),
    _token("age_secret_key", literal("AGE-SECRET-KEY-1"), chars("A-Z0-9", 58, 58), "age-secret"),
    SecretKind(
        "sendgrid_key",
        0.99,
        sequence(literal("SG."), chars(_URLSAFE, 22, 22), literal("."), chars(_URLSAFE, 43, 43)),
        ("sg.",),
    ),
    SecretKind(
        "api_key",
        0.95,
        sequence(literal("sk-"), chars(_URLSAFE, 20, 256)),
        ("sk-",),
        accept=_accept_random,
    ),
    SecretKind("private_key", 0.99, _PEM, ("private key",), before="", accept=_accept_private),
    SecretKind("jwt", 0.9, _JWT, ("eyj",), before=rf"(?<![{_URLSAFE}])"),
    SecretKind("connection_password", 0.95, _CONNECTION, ("://",), accept=_accept_password),
    SecretKind(
        "assigned_secret",
        0.8,
        _ASSIGNED,
        ("pass", "pwd", "secret", "token", "key", "credential"),
        before="(?<![A-Za-z])",
        accept=_accept_assigned,
    ),
    SecretKind("card_number", 0.9, _CARD, _DIGITS, before=r"(?<![\w.,+-])", accept=accept_card),
    SecretKind("iban", 0.95, _IBAN, tuple("0123456789"), after=r"(?![A-Za-z])", accept=accept_iban),
)
