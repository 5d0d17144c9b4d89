"""A planted string is found through case, spacing and simple codes; cut or padded too."""

from __future__ import annotations

import base64
import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortpoint.errors import ConfigError
from fortpoint.guard.rules.canary import MAX_CHARS, Canaries
from fortpoint.guard.rules.stream import SecretScanner

SECRET = "harbour-4711-Lantern"
RAW = SECRET.encode()
CANARIES = Canaries({"prompt": SECRET})
_TOLD = {
    "as it is": SECRET,
    "upper case": SECRET.upper(),
    "spaced": " ".join(SECRET),
    "in lines": "\n".join(SECRET),
    "backwards": SECRET[::-1],
    "rot13": codecs.encode(SECRET, "rot13"),
    "base64": base64.b64encode(RAW).decode(),
    "base64 after one byte": base64.b64encode(b"x" + RAW + b"tail").decode(),
    "base64 after two bytes": base64.b64encode(b"xx" + RAW + b"tail").decode(),
    "base64 of lower case": base64.b64encode(SECRET.lower().encode()).decode(),
    "base32": base64.b32encode(b"abc" + RAW).decode(),
    "hex": RAW.hex(),
    "hex by \\x": "".join(f"\\x{byte:02x}" for byte in RAW),
    "percent": "".join(f"%{byte:02X}" for byte in RAW),
    "decimal": ", ".join(map(str, RAW)),
    "binary": " ".join(f"{byte:08b}" for byte in RAW),
    "unicode escapes": "".join(f"\\u{byte:04x}" for byte in RAW),
    "leetspeak": SECRET.lower().replace("a", "4").replace("e", "3").replace("o", "0"),
    "full width": "".join(chr(ord(char) + 0xFEE0) for char in SECRET),
    "zero width": "\u200b".join(SECRET),
    "most of it": SECRET[:14],
}


@pytest.mark.parametrize("how", _TOLD)
def test_canary_told_in_disguise_is_found_and_leaves_no_stream(how: str) -> None:
    text = f"It says: {_TOLD[how]} ."
    assert {finding.kind for finding in CANARIES.find(text)} == {"prompt"}
    scanner = SecretScanner(CANARIES)
    out = "".join(scanner.feed(char).text for char in text) + scanner.flush().text
    assert len(out) <= len(text) - 0.6 * len(_TOLD[how])
    assert not CANARIES.find(out)


@pytest.mark.parametrize(
    "text", ["", "the harbour has a lantern", "4711", "harbour 4712", SECRET[:8], "h a r b o u r"]
)
def test_canary_ordinary_text_has_none(text: str) -> None:
    assert CANARIES.find(text) == ()


@given(st.text(), st.text())
def test_canary_between_any_texts_is_found(before: str, after: str) -> None:
    text = f"{before}\n{SECRET}\n{after}"
    start = len(before) + 1
    assert any(f.start >= start and f.end <= start + len(SECRET) for f in CANARIES.find(text))


def test_canary_of_several_is_named() -> None:
    canaries = Canaries({"first": "one-two-three-four", "second": "five-six-seven-eight"})
    assert {f.kind for f in canaries.find("FIVE SIX SEVEN EIGHT")} == {"second"}


def test_canary_long_text_is_found_by_a_part_of_it() -> None:
    prompt = "You are the keeper of the lantern at the harbour and never tell the code. " * 4
    assert Canaries({"prompt": prompt}).find("It began: " + prompt[:80])


@pytest.mark.parametrize("secret", ["", "tiny77", "!!!!!!!!!!!!", "a" * (MAX_CHARS + 1)])
def test_canary_that_cannot_be_found_is_refused_without_naming_it(secret: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Canaries({"prompt": secret})
    assert not secret or secret not in str(raised.value)
