"""The index file: what is written is read, and nothing else is believed."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fortpoint.errors import ModelError, NotFound, StorageError
from fortpoint.features.understanding import index as indexing
from fortpoint.features.understanding.index import (
    FILE,
    VERSION,
    Cluster,
    Context,
    Effect,
    Feature,
    Header,
    Index,
    Kin,
    Rule,
    Term,
    plain,
)


def feature(number: int, **more: Any) -> Feature:
    made = {
        "index": number,
        "label": f"label {number}",
        "label_score": 0.8,
        "labeller": "",
        "rule": Rule(-1.5, (Term("word", "bridge", 2.25),)),
        "frequency": 0.01,
        "max_activation": 7.5,
        "histogram": (5, 3, 1),
        "contexts": (Context((" the", " bridge", "\n"), (0, 100, 3), 1, 0),),
        "promoted": (Effect(" bay", 1.25),),
        "suppressed": (Effect(" sea", -0.5),),
        "neighbours": (Kin(1 - number, 93),),
        "encoder_neighbours": (),
        "coactive": (Kin(1 - number, -4),),
        "cluster": 0,
        "x": 10,
        "y": 990,
    }
    return Feature(**(made | more))


def made(*features: Feature) -> Index:
    header = Header(
        version=VERSION, dictionary="d", model="m", model_digest="sha256:2", digest="sha256:1",
        layer=3, n_features=len(features), n_tokens=1000, n_held_out_tokens=100, n_dead=0,
        n_judged=2, mean_score=0.8, mean_score_random=0.85,
        clusters=(Cluster("bridges", 2, 5, 5),), classes=("a/b",), class_of_token=b"\x00\x00",
    )  # fmt: skip
    return Index(header, features)


@pytest.fixture
def whole() -> Index:
    return made(feature(0), feature(1))


def rewritten(folder: Path, number: int, change: Any) -> None:
    """One line of the file changed by ``change``; line 0 is the header."""
    lines = gzip.decompress((folder / FILE).read_bytes()).splitlines()
    value = json.loads(lines[number])
    lines[number] = json.dumps(change(value)).encode()
    (folder / FILE).write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))


LINE = {name: number for number, name in enumerate(Feature.__struct_fields__, 1)}


def test_index_that_was_saved_is_read_as_it_was(tmp_path: Path, whole: Index) -> None:
    whole.save(tmp_path)
    read = Index.load(tmp_path, 2)
    assert read.header == whole.header
    assert read.features == whole.features
    assert os.listdir(tmp_path) == [FILE]


def test_same_index_gives_the_same_bytes(whole: Index) -> None:
    assert whole.packed() == whole.packed()


def test_header_names_the_fields_that_the_lines_have(tmp_path: Path, whole: Index) -> None:
    whole.save(tmp_path)
    header, *lines = gzip.decompress((tmp_path / FILE).read_bytes()).splitlines()
    columns = dict(zip(json.loads(header)["fields"], map(json.loads, lines), strict=True))
    assert columns["label"] == ["label 0", "label 1"]
    assert columns["y"] == [990, 990]


def test_index_of_several_blocks_is_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BLOCK", 3)
    for n in (2, 3, 4, 9):
        index = made(*(feature(i, neighbours=(), coactive=()) for i in range(n)))
        index.save(tmp_path)
        assert Index.load(tmp_path).features == index.features


@pytest.mark.parametrize("cut", ["line", "value", "more"])
def test_block_whose_lines_do_not_go_together_is_refused(
    tmp_path: Path, whole: Index, cut: str
) -> None:
    whole.save(tmp_path)
    lines = gzip.decompress((tmp_path / FILE).read_bytes()).splitlines()
    if cut == "line":
        del lines[-1]
    elif cut == "value":
        lines[3] = b"[0.5]"
    else:
        lines.append(b"[]")
    (tmp_path / FILE).write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    with pytest.raises(ModelError):
        Index.load(tmp_path)


def test_plain_names_fields_all_the_way_down() -> None:
    shown = json.loads(msgspec.json.encode(plain(feature(0))))
    assert shown["rule"]["terms"][0] == {"kind": "word", "value": "bridge", "weight": 2.25}
    assert shown["contexts"][0]["strengths"] == [0, 100, 3]
    assert shown["neighbours"] == [{"index": 1, "closeness": 93}]


def test_scores_are_counted_again_with_new_features(whole: Index) -> None:
    changed = whole.with_features((feature(0, label_score=None), feature(1, label_score=0.4)))
    assert (changed.header.n_judged, changed.header.mean_score) == (1, 0.4)


def test_absent_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="fortpoint features describe"):
        Index.load(tmp_path)


def test_index_of_another_size_is_refused(tmp_path: Path, whole: Index) -> None:
    whole.save(tmp_path)
    with pytest.raises(ModelError, match="describes 2 features, the dictionary has 3"):
        Index.load(tmp_path, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index", 1),
        ("label", "x" * 513),
        ("label", None),
        ("label_score", 1.5),
        ("frequency", -0.1),
        ("max_activation", -1.0),
        ("histogram", [1] * 65),
        ("histogram", [-1]),
        ("contexts", [[["a"], [1, 2], 0, 0]]),
        ("contexts", [[["a"], [1], 1, 0]]),
        ("contexts", [[["a"], [101], 0, 0]]),
        ("contexts", [[[], [], 0, 0]]),
        ("neighbours", [[2, 50]]),
        ("coactive", [[0, 101]]),
        ("cluster", 1),
        ("cluster", -2),
        ("x", 1001),
        ("rule", [0.0, [["word", "a", -1.0]]]),
        ("rule", [0.0, [["word", "a", 1.0, 2.0]]]),
    ],
)
def test_line_out_of_range_is_refused(tmp_path: Path, whole: Index, field: str, value: Any) -> None:
    whole.save(tmp_path)
    rewritten(tmp_path, LINE[field], lambda column: [value, *column[1:]])
    with pytest.raises(ModelError):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header | {"version": 99},
        lambda header: header | {"n_features": 3},
        lambda header: header | {"n_features": 10**9},
        lambda header: header | {"unknown": 1},
        lambda header: header | {"fields": ["index"]},
        lambda header: [header],
    ],
)
def test_header_that_is_wrong_is_refused(tmp_path: Path, whole: Index, change: Any) -> None:
    whole.save(tmp_path)
    rewritten(tmp_path, 0, change)
    with pytest.raises(ModelError):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip at all",
        gzip.compress(b""),
        gzip.compress(b"{}\n"),
        gzip.compress(b"[" * 100_000 + b"\n"),
        gzip.compress(b'{"version": 1}'),
        gzip.compress(b"\xff\xfe\n"),
    ],
)
def test_file_that_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ModelError):
        Index.load(tmp_path)


def test_every_cut_of_the_file_is_refused(tmp_path: Path, whole: Index) -> None:
    packed = whole.packed()
    for size in range(0, len(packed), 7):
        (tmp_path / FILE).write_bytes(packed[:size])
        with pytest.raises(ModelError):
            Index.load(tmp_path)


def test_file_that_unpacks_to_too_much_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "MAX_LINE_BYTES", 1 << 16)
    (tmp_path / FILE).write_bytes(gzip.compress(b"0" * (1 << 26)))
    with pytest.raises(ModelError, match="unpacks to too much"):
        Index.load(tmp_path)


def test_index_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, whole: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole.save(tmp_path)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        made(feature(0)).save(tmp_path)
    monkeypatch.undo()
    assert Index.load(tmp_path).features == whole.features
    assert os.listdir(tmp_path) == [FILE]
