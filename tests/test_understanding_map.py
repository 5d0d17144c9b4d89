"""The map is a page that loads and runs nothing, whatever its labels say."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fortpoint.errors import StorageError
from fortpoint.features.understanding import map_page
from fortpoint.features.understanding.index import Context
from fortpoint.features.understanding.writing import quoted, visible
from test_understanding_index import feature, made

EVIL = "</title><script>alert(1)</script>\"'><img src=x onerror=y>\x1b[2J\u202e"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> _Tags:
    parser = _Tags()
    parser.feed(page)
    return parser


def test_page_has_a_light_and_an_entry_for_each_feature() -> None:
    page = parsed(map_page.page(made(feature(0), feature(1))))
    lights = [value for name, value in page.attributes if name == "class" and value == "f"]
    assert len(lights) == 2
    linked = {value for name, value in page.attributes if name == "href"}
    there = {f"#{value}" for name, value in page.attributes if name == "id"}
    assert linked <= there
    assert "bridges" in page.text
    assert "label 1" in page.text


def test_page_runs_and_loads_nothing() -> None:
    page = map_page.page(made(feature(0), feature(1)))
    found = parsed(page)
    assert not {"script", "link", "img", "iframe", "object", "foreignobject"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert all(
        value.startswith("#") for name, value in found.attributes if name == "href" and value
    )
    assert "default-src 'none'" in page
    assert "url(http" not in page
    assert "@import" not in page


def test_label_that_is_markup_stays_text() -> None:
    evil = feature(1, label=EVIL, contexts=(Context((EVIL, EVIL), (100, 0), 0, 0),))
    page = map_page.page(made(feature(0), evil))
    assert "script" not in parsed(page).tags
    assert "img" not in parsed(page).tags
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_page_of_no_clusters_is_a_page() -> None:
    index = made(feature(0, cluster=-1), feature(1, cluster=-1))
    assert "<svg" in map_page.page(index)


def test_map_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="No space left"):
        map_page.write(made(feature(0), feature(1)), tmp_path / "map.html")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" bridge", "bridge"),
        ("ing", "'ing'"),
        ("\n", "'⏎'"),
        ("\x1b[2J", "'·[2J'"),
        ("  x", "'  x'"),
    ],
)
def test_token_is_quoted_where_its_spaces_matter(token: str, shown: str) -> None:
    assert quoted(token) == shown


def test_visible_text_has_no_character_that_acts() -> None:
    assert visible("a\x1b[31m\u202eb\r\n\x07") == "a·[31m·b␍⏎·"
