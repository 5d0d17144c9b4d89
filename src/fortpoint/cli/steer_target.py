"""Which feature somebody means: by its name, or by words for it.

    found = named("golden gate", description, folders)
    found.target                 # "golden-gate", or "l15/1207"

A direction's name and ``<dictionary>/<index>`` are taken as they are. Other words are looked
for among what is known of the dictionaries' features (``features/understanding``); where no
dictionary has such an index, or nothing fits, the nearest names are given.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fortpoint.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from fortpoint.engine.protocol import Description

_FEATURE = re.compile(r"[^\s/]+/[^\s/]*")
_NEAR = 0.75
_MAX_CHARS = 200
_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """``label`` is what a feature is called, ``others`` what else the words may mean."""

    target: str
    label: str | None = None
    others: tuple[str, ...] = ()


def named(words: str, description: Description, folders: Sequence[Path]) -> Found:
    """What is meant. ``folders`` have dictionaries in them, those to prefer first.

    Raises ``InvalidRequest`` that names what is nearest.
    """
    wanted = " ".join(words.split())
    if not wanted or len(wanted) > _MAX_CHARS:
        raise InvalidRequest(
            f"name a direction, <dictionary>/<index>, or up to {_MAX_CHARS} characters of words",
            param="target",
        )
    direction = _direction(wanted, description.directions)
    if direction is not None:
        return Found(direction)
    if _FEATURE.fullmatch(wanted):
        _check_loaded(wanted, description)
        return Found(wanted)
    if wanted in {card.name for card in description.dictionaries}:
        raise InvalidRequest(
            f"{wanted} is a dictionary; name a feature of it, as {wanted}/0", param="target"
        )
    return _by_words(wanted, description, folders)


def _direction(wanted: str, directions: Sequence[str]) -> str | None:
    """Its name, also with spaces for its dashes. Raises ``InvalidRequest`` for a near miss."""
    for name in directions:
        if wanted == name or _plain(wanted) == _plain(name):
            return name
    near = difflib.get_close_matches(_plain(wanted), map(_plain, directions), n=1, cutoff=_NEAR)
    if near:
        meant = next(name for name in directions if _plain(name) == near[0])
        raise InvalidRequest(
            f"there is no direction {wanted!r}; did you mean {meant!r}?", param="target"
        )
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s._-]+", " ", name).lower()


def _check_loaded(target: str, description: Description) -> None:
    from fortpoint.gateway import white_box

    white_box.check_targets([("target", target)], description, "")


def _by_words(wanted: str, description: Description, folders: Sequence[Path]) -> Found:
    from fortpoint.features.understanding.index import Index
    from fortpoint.features.understanding.search import Search

    hits: list[tuple[float, str, str]] = []
    n_indexed = 0
    for card in description.dictionaries:
        folder = next((f / card.name for f in folders if (f / card.name).is_dir()), None)
        if folder is None:
            continue
        try:
            index = Index.load(folder, card.n_features)
        except NotFound:  # nobody has described it yet
            continue
        n_indexed += 1
        for hit in Search(index).words(wanted, _SHOWN):
            label = index.features[hit.feature].label
            hits.append((hit.score, f"{card.name}/{hit.feature}", label))
    if not hits:
        raise _nothing(wanted, description, n_indexed)
    hits.sort(key=lambda hit: (-hit[0], hit[1]))
    _, target, label = hits[0]
    others = tuple(f"{name} ({of})" for _, name, of in hits[1:_SHOWN])
    return Found(target, label, others)


def _nothing(wanted: str, description: Description, n_indexed: int) -> InvalidRequest:
    names = [*description.directions, *(f"{card.name}/0" for card in description.dictionaries)]
    near = difflib.get_close_matches(wanted, names, n=_SHOWN, cutoff=0.0)
    nearest = f"nearest: {', '.join(near)}" if near else "no direction or dictionary is loaded"
    searched = (
        "no feature is known by these words"
        if n_indexed
        else "no dictionary here has an index to look words up in (`fortpoint features describe`)"
    )
    return InvalidRequest(
        f"there is nothing called {wanted!r}: {searched}; {nearest}", param="target"
    )
