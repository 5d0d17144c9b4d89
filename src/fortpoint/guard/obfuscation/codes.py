"""Codes that a program makes of bytes: Base64, hexadecimal, Base32, Base85, numbers, escapes.

Each function yields the spans of one code whose bytes are a readable text. Random bytes are
practically never readable, so hashes, keys, UUIDs and images yield none.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator

from fortpoint.guard.obfuscation.english import is_word, likelihood
from fortpoint.guard.obfuscation.span import Span

MIN_CHARS = 6

_LETTERLIKE = -3.7
_LONG = 12
_CODED = re.compile(r"[A-Za-z0-9+/=_\-\s%\\.,:;&#|]+")


def readable(text: str) -> bool:
    """Whether it looks like something written in words, in any language.

    A long run of printable characters does not come by chance, so it may be in code again.
    """
    if len(text) < MIN_CHARS:
        return len(text) >= 4 and is_word(text.lower())
    sample = text[:4000]
    if not all(map(_prints, sample)):
        return False
    wordlike = sum(char.isalpha() or char.isspace() or char in "'\u2019" for char in sample)
    if wordlike < 0.6 * len(sample):
        return len(sample) >= _LONG and _CODED.fullmatch(sample) is not None
    n_ascii = sum(char.isascii() for char in sample)
    return len(sample) >= _LONG or n_ascii < 0.5 * len(sample) or likelihood(sample) > _LETTERLIKE


def _prints(char: str) -> bool:
    return char.isprintable() or char in "\t\r\n"


def _decoded(data: bytes) -> str | None:
    """Readable text of bytes in UTF-8, or in UTF-16 without the zeros of ASCII."""
    if data[1::2].count(0) > len(data) // 3:
        data = data.replace(b"\0", b"")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if readable(text) else None


_TELL64 = re.compile(r"[a-z0-9+/][A-Z0-9]")
# Tokens in which a capital or a digit follows a letter: no plain words.
_TOKENS64 = re.compile(
    r"(?<![A-Za-z0-9+/_])(?=\S{0,40}?[a-z0-9+/][A-Z0-9])[A-Za-z0-9+/_\-]{4,}+={0,2}"
    r"(?:\s{1,3}(?=\S{0,40}?[A-Za-z0-9+/][A-Z0-9=])[A-Za-z0-9+/_\-]{2,}+={0,2})*"
)


def base64_text(text: str) -> Iterator[Span]:
    """Base64, also URL-safe, unpadded, wrapped in lines, or word by word."""
    if _TELL64.search(text) is None:
        return
    for run in _TOKENS64.finditer(text):
        if len(run[0]) >= 8:
            yield from _base64_run(run[0], run.start())


def _base64_run(run: str, start: int) -> Iterator[Span]:
    """A run as one text, or its tokens each on its own."""
    whole = _from_base64("".join(run.split()))
    if whole is not None:
        yield Span(start, start + len(run), whole, "base64")
        return
    tokens = [(m.span(), _bytes64(m[0])) for m in re.finditer(r"\S+", run)]
    said = _decoded(b" ".join(data for _, data in tokens if data))
    if len(tokens) > 1 and said is not None:
        yield Span(start, start + len(run), said, "base64")
        return
    for (first, last), data in tokens:
        one = _decoded(data) if data and last - first >= 12 else None
        if one is not None:
            yield Span(start + first, start + last, one, "base64")


def _from_base64(token: str) -> str | None:
    data = _bytes64(token)
    return None if data is None else _decoded(data)


def _bytes64(token: str) -> bytes | None:
    """Bytes of either alphabet; characters of a broken last group are left out."""
    bare = token.replace("=", "").replace("-", "+").replace("_", "/")
    bare = bare[: len(bare) - 1] if len(bare) % 4 == 1 else bare
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except binascii.Error:
        return None


_HEX = re.compile(r"(?<![0-9A-Za-z])(?:(?:0x|\\x)?[0-9A-Fa-f]{2}[\s,:;\-]{0,2}){6,}(?![0-9A-Za-z])")
_BINARY = re.compile(r"(?<![0-9])(?:[01]{7,8}[\s,\-]{0,2}){4,}(?![0-9])")
_DECIMAL = re.compile(r"(?<![0-9.,])[0-9]{2,3}(?:[\s,;\-]{1,2}[0-9]{2,3}){5,}(?![0-9])")


def numbers(text: str) -> Iterator[Span]:
    """Bytes as hexadecimal, binary, decimal or octal numbers."""
    for run in _BINARY.finditer(text):
        bits = re.sub(r"[^01]", "", run[0])
        size = 7 if re.match(r"[01]{7}(?![01])", run[0]) else 8
        groups = (bits[i : i + size] for i in range(0, len(bits) - size + 1, size))
        yield from _span(run, bytes(int(group, 2) for group in groups), "binary")
    for run in _HEX.finditer(text):
        digits = re.sub(r"0x|\\x|[^0-9A-Fa-f]", "", run[0])
        yield from _span(run, bytes.fromhex(digits[: len(digits) // 2 * 2]), "hex")
    for run in _DECIMAL.finditer(text):
        values = re.findall(r"[0-9]+", run[0])
        for base, kind in ((10, "decimal"), (8, "octal")):
            spans = tuple(_span(run, _small(values, base), kind))
            yield from spans
            if spans:
                break


def _small(values: list[str], base: int) -> bytes:
    """Numbers below 256 as bytes; nothing when one of them is no such number."""
    try:
        return bytes(int(value, base) for value in values)
    except ValueError:
        return b""


def _span(run: re.Match[str], data: bytes, kind: str) -> Iterator[Span]:
    said = _decoded(data)
    if said is not None:
        yield Span(run.start(), run.end(), said, kind)


_BASE32 = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z2-7]{8}){1,}[A-Z2-7]{2,8}={0,6}(?![A-Za-z0-9=])")
_BASE85 = re.compile(r"(?<!\S)(?:<~[!-uz\s]{8,}~>|[!-~]{15,})(?!\S)")
_UU = re.compile(r"(?m)^[!-M][ -`]{8,60}$(?:\n[!-M`][ -`]{0,60}$)*")


def base32_text(text: str) -> Iterator[Span]:
    for run in _BASE32.finditer(text):
        bare = run[0].rstrip("=")
        bare = bare[: len(bare) - (1 if len(bare) % 8 in {1, 3, 6} else 0)]
        yield from _span(run, _try(base64.b32decode, bare + "=" * (-len(bare) % 8)), "base32")


def base85_text(text: str) -> Iterator[Span]:
    """Ascii85, bracketed or not, and the Base85 of git."""
    for run in _BASE85.finditer(text):
        inner = run[0].removeprefix("<~").removesuffix("~>")
        if re.fullmatch(r"[\w./:@-]+", inner):
            continue
        for decode in (base64.a85decode, base64.b85decode):
            spans = tuple(_span(run, _try(decode, inner), "base85"))
            yield from spans
            if spans:
                break


def uuencoded(text: str) -> Iterator[Span]:
    for run in _UU.finditer(text):
        lines = [_try(binascii.a2b_uu, line) for line in run[0].split("\n")]
        yield from _span(run, b"".join(lines), "uuencode")


def _try(decode: Callable[[str], bytes], text: str) -> bytes:
    """The bytes, or none where the text is not of this code."""
    try:
        return decode(text)
    except (ValueError, binascii.Error):
        return b""


# Bytes in a row are one text in UTF-8; the others are code points.
_BYTES = re.compile(r"(?:%[0-9A-Fa-f]{2})+|(?:=[0-9A-F]{2})+|(?:\\x[0-9A-Fa-f]{2})+")
_POINT = re.compile(
    r"(?:%u|\\u\{?)([0-9A-Fa-f]{4})\}?|U\+([0-9A-Fa-f]{4,6})\s?|&#[xX]([0-9A-Fa-f]{1,6});?"
    r"|&#([0-9]{1,7});?"
)
_SOFT_BREAK = re.compile(r"=\r?\n")
_LETTER_ESCAPE = re.compile(
    r"(?:%(?:u00)?|=|\\x|\\u\{?00|U\+00|&#[xX]0{0,4})(?:4[1-9A-Fa-f]|5[0-9Aa]|6[1-9A-Fa-f]|7[0-9Aa])"
    r"|&#0{0,3}(?:6[5-9]|[78][0-9]|9[0-9]|1[01][0-9]|12[0-2]);"
)


def escapes(text: str) -> Iterator[Span]:
    r"""Letters written as %XX, =XX, \xXX, \uXXXX, U+XXXX or &#N;: nobody has to escape those."""
    letters = [match.span() for match in _LETTER_ESCAPE.finditer(text)]
    if len(letters) < 4:
        return
    start = text.rfind(" ", 0, letters[0][0]) + 1
    end = letters[-1][1]
    following = text.find(" ", end)
    end = len(text) if following < 0 else following
    said = _BYTES.sub(_unquoted, _SOFT_BREAK.sub("", text[start:end]))
    said = _POINT.sub(_unescaped, said)
    if readable(said):
        yield Span(start, end, said, "escapes")


def _unquoted(match: re.Match[str]) -> str:
    digits = re.sub(r"%|=|\\x", "", match[0])
    return bytes.fromhex(digits).decode("utf-8", "replace")


def _unescaped(match: re.Match[str]) -> str:
    digits = next(group for group in match.groups() if group is not None)
    code = int(digits, 10 if match[4] is not None else 16)
    return chr(code) if code < 0x110000 else " "
