"""Example files are checked line by line before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fortpoint.errors import InvalidRequest
from fortpoint.features.concepts import background
from fortpoint.features.concepts.examples import (
    MAX_CHARS,
    MAX_POSITIVES,
    Examples,
    digest,
    read,
    read_lines,
)

FIVE = tuple(f"sentence number {n}" for n in range(5))


def test_text_file_has_a_sentence_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("  one \ntwo\r\n{not json\n")
    assert read_lines(file) == ("one", "two", "{not json")


def test_jsonl_file_has_a_text_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "one", "more": 1}\n{"text": " t\\u00fco"}\n')
    assert read_lines(file) == ("one", "tüo")


def test_both_files_become_examples(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(FIVE))
    (tmp_path / "n.txt").write_text("other\n")
    assert read(tmp_path / "p.txt", tmp_path / "n.txt") == Examples(FIVE, ("other",))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", b"one\n\ntwo\n", r"p\.txt, line 2 is empty"),
        ("p.txt", b"one\n  \t\n", r"line 2 is empty"),
        ("p.txt", b"one\n\xff\xfe\n", r"line 2 is not text in UTF-8"),
        ("p.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', r'line 2 is not \{"text"'),
        ("p.jsonl", b'{"text": 3}\n', r"line 1 is not"),
        ("p.jsonl", b"[" * 5000 + b"\n", r"line 1 is not"),
        ("p.jsonl", b'{"text": " "}\n', r"line 1 is empty"),
    ],
)
def test_line_that_is_no_sentence_is_named(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=complaint):
        read_lines(tmp_path / name)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        read_lines(tmp_path / "absent.txt")


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"x\n" * (5 << 20))
    with pytest.raises(InvalidRequest, match="larger than"):
        read_lines(tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("positives", "negatives", "complaint"),
    [
        (FIVE[:1], (), "one example shows everything"),
        (FIVE[:4], (), "5 to 200 positive sentences, these are 4"),
        ((), (), "these are 0"),
        (tuple(map(str, range(MAX_POSITIVES + 1))), (), "these are 201"),
        ((*FIVE, FIVE[2]), (), "positive sentences 3 and 6 are the same"),
        ((*FIVE, "sentence  number 2"), (), "3 and 6 are the same"),
        ((*FIVE, " "), (), "positive sentence 6 is empty"),
        ((*FIVE, "x" * (MAX_CHARS + 1)), (), "more than 2000"),
        (FIVE, FIVE, "5 of the sentences are positive and negative"),
        (FIVE, ("other", FIVE[3]), "1 of the sentences"),
        (FIVE, ("other", "other"), "negative sentences 1 and 2 are the same"),
        (FIVE, tuple(map(str, range(2001))), "at most 2000 negatives"),
    ],
)
def test_examples_that_show_no_concept_are_refused(
    positives: tuple[str, ...], negatives: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        Examples(positives, negatives)


def test_case_makes_another_sentence() -> None:
    assert Examples(FIVE, tuple(text.upper() for text in FIVE)).negatives[0].startswith("SENT")


def test_digest_depends_on_every_text_and_its_place() -> None:
    assert digest(FIVE) == digest(list(FIVE))
    assert len({digest(FIVE), digest(FIVE[::-1]), digest(FIVE[:4]), digest(("".join(FIVE),))}) == 4


def test_background_is_varied_and_fit_to_be_read() -> None:
    texts = background.sentences()
    assert len(texts) >= 300
    Examples(FIVE, texts)
    assert 0.12 < sum(text.endswith("?") for text in texts) / len(texts) < 0.4
    assert not set(background.questions()) & set(texts)
