from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortpoint.engine.detokenizer import Detokenizer


def _decode(tokens: Sequence[int]) -> str:
    """One token a byte, as a byte-level tokenizer's worst case."""
    return bytes(tokens).decode("utf-8", "replace")


def _run(text: str, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(_decode, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(detokenizer.add(byte))
        if detokenizer.stopped:
            return pieces, True
    return [*pieces, detokenizer.finish()], False


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd")))
def test_detokenizer_any_text_comes_out_whole(text: str) -> None:
    pieces, _ = _run(text)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


@given(st.text(alphabet="ab#", max_size=30), st.text(alphabet="ab#", min_size=1, max_size=4))
def test_detokenizer_stop_string_never_leaves_in_part(text: str, stop: str) -> None:
    pieces, stopped = _run(text, [stop])
    assert stopped == (stop in text)
    assert "".join(pieces) == text.split(stop, maxsplit=1)[0]


@pytest.mark.parametrize(("text", "kept"), [("say END now", "say "), ("say EN", "say EN")])
def test_detokenizer_holds_back_only_what_may_become_a_stop(text: str, kept: str) -> None:
    pieces, _ = _run(text, ["END"])
    assert "".join(pieces) == kept
    assert pieces[0] == "s"


def test_detokenizer_incomplete_character_at_the_end_is_replaced() -> None:
    detokenizer = Detokenizer(_decode)
    assert detokenizer.add(0xE2) == ""
    assert detokenizer.finish() == "\ufffd"


def test_detokenizer_of_a_decoder_that_strips_a_first_space_keeps_inner_ones() -> None:
    words = [" a", " bc", "d"] * 30
    detokenizer = Detokenizer(lambda tokens: "".join(words[i] for i in tokens).removeprefix(" "))
    pieces = [detokenizer.add(i) for i in range(len(words))]

    assert "".join(pieces) + detokenizer.finish() == "".join(words).removeprefix(" ")


def test_detokenizer_decodes_little_more_than_once_a_token() -> None:
    n_calls = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal n_calls
        n_calls += 1
        assert len(tokens) < 32
        return _decode(tokens)

    detokenizer = Detokenizer(decode)
    for _ in range(1000):
        detokenizer.add(ord("x"))
    assert n_calls < 1200


def test_detokenizer_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    detokenizer = Detokenizer(_decode)
    text = "".join(detokenizer.add(0x82) for _ in range(64)) + detokenizer.finish()
    assert text == "\ufffd" * 64
