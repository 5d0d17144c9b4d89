"""The map of a dictionary as one page of HTML: lights over dark water, a harbour to each cluster.

Nothing is loaded from anywhere and no script runs: the page's own policy forbids both. A light
is a feature; it tells its label when pointed at and leads to its entry in the list below.
"""

from __future__ import annotations

import colorsys
import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fortpoint.errors import StorageError
from fortpoint.features.understanding.index import Cluster, Context, Feature, Index
from fortpoint.features.understanding.writing import visible

FILE = "map.html"

_WIDTH, _HEIGHT, _EDGE = 1500, 1000, 50
_GOLDEN_ANGLE = 0.381966
_LETTER = 0.52  # of a letter's height: its width
_NUDGES = (0, 13, -13, 26, -26)
_SNIPPET_BEFORE, _SNIPPET_AFTER = 6, 3

_STYLE = """
:root { color-scheme: dark; }
body { margin: 0; background: #0b1522; color: #d8e0e8; font: 15px/1.5 Georgia, serif; }
header, main { max-width: 1500px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; font-weight: 400; letter-spacing: .02em; margin: 0; color: #ffd9a0; }
p { margin: .3rem 0; color: #9fb0c0; }
svg { display: block; width: 100%; height: auto; border-radius: 10px; }
svg a { outline: none; }
svg circle.f:hover, svg a:focus circle.f { stroke: #fff; stroke-width: 2; r: 7; opacity: 1; }
svg text { font: italic 15px Georgia, serif; fill: #f4ead8; paint-order: stroke;
  stroke: #0b1522; stroke-width: 4px; stroke-linejoin: round; }
svg g:hover > .halo { opacity: .55; }
.cards { columns: 3 24rem; column-gap: 1.5rem; }
section { break-inside: avoid; margin: 0 0 1.2rem; padding: .8rem 1rem; border-radius: 8px;
  background: #111f30; border-left: 4px solid; }
section:target { background: #1a2d44; }
h2 { font-size: 1rem; margin: 0 0 .4rem; font-weight: 600; color: #ffe7c4; }
ol { list-style: none; margin: 0; padding: 0; max-height: 22rem; overflow-y: auto;
  scrollbar-width: thin; }
li { padding: .25rem 0; border-top: 1px solid #1e3147; font-size: .87rem; }
li:target { background: #2b4766; box-shadow: 0 0 0 4px #2b4766; }
li b { font-weight: 600; color: #eef3f7; }
li i { color: #8ea2b5; font-style: normal; }
li mark { background: #ffb84d; color: #16202c; border-radius: 3px; }
li small { color: #6f869b; }
"""


@dataclass(frozen=True)
class _Placed:
    """A name's box on the map."""

    x: float
    y: float
    half_width: float

    def overlaps(self, other: _Placed) -> bool:
        near = abs(self.x - other.x) < self.half_width + other.half_width
        return near and abs(self.y - other.y) < 17


def write(index: Index, path: Path) -> None:
    """Whole or not at all. Raises ``StorageError``."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page(index), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path.name}: {error.strerror or error}") from None


def page(index: Index) -> str:
    """The whole document."""
    header = index.header
    members: list[list[Feature]] = [[] for _ in header.clusters]
    for feature in index.features:
        if feature.cluster >= 0:
            members[feature.cluster].append(feature)
    title = f"{header.dictionary}: {header.n_features - header.n_dead} features"
    score = ""
    if header.mean_score is not None:
        score = f" Their labels predict them on unseen text with {header.mean_score:.2f}."
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_safe(title)}</title><style>{_STYLE}</style></head><body>",
            f"<header><h1>{_safe(title)}</h1>",
            f"<p>Layer {header.layer} of {_safe(header.model)}, read over "
            f"{header.n_tokens:,} tokens. Features that point the same way and keep company lie "
            f"together.{score} Point at a light for its label; follow it to its entry.</p>",
            "</header>",
            "<main>",
            *_map(header.clusters, members),
            '<p></p><div class="cards">',
            *(_card(n, c, members[n]) for n, c in enumerate(header.clusters)),
            "</div></main></body></html>",
        ]
    )


def _map(clusters: Sequence[Cluster], members: Sequence[Sequence[Feature]]) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Map of features"><defs><filter id="blur" x="-50%" y="-50%" width="200%" '
        'height="200%"><feGaussianBlur stdDeviation="18"/></filter><radialGradient id="water" '
        'cy=".35" r=".9"><stop stop-color="#1c3a58"/><stop offset="1" stop-color="#0b1522"/>'
        f'</radialGradient></defs><rect width="{_WIDTH}" height="{_HEIGHT}" fill="url(#water)"/>'
    )
    for number, features in enumerate(members):
        yield _harbour(number, features)
    for number, place in _names(clusters):
        yield (
            f'<a href="#c{number}"><text x="{place.x:.0f}" y="{place.y:.0f}" '
            f'text-anchor="middle">{_safe(clusters[number].name)}</text></a>'
        )
    yield "</svg>"


def _harbour(number: int, features: Sequence[Feature]) -> str:
    """One cluster: a halo, and a light for each feature."""
    if not features:
        return ""
    points = np.array([(_x(f.x), _y(f.y)) for f in features])
    middle = np.median(points, axis=0)
    reach = float(np.median(np.linalg.norm(points - middle, axis=1))) + 14
    colour = _colour(number)
    parts = [
        f'<g fill="{colour}"><circle class="halo" cx="{middle[0]:.0f}" cy="{middle[1]:.0f}" '
        f'r="{min(reach, 120):.0f}" opacity=".28" filter="url(#blur)"/>'
    ]
    for feature, (x, y) in zip(features, points.tolist(), strict=True):
        radius = 1.6 + 2.6 * min(1.0, float(np.sqrt(feature.frequency * 40)))
        shine = 0.45 if feature.label_score is None else 0.3 + 0.7 * feature.label_score
        parts.append(
            f'<a href="#f{feature.index}"><circle class="f" cx="{x:.0f}" cy="{y:.0f}" '
            f'r="{radius:.1f}" opacity="{shine:.2f}"><title>{feature.index}: '
            f"{_safe(feature.label)}</title></circle></a>"
        )
    return "".join(parts) + "</g>"


def _names(clusters: Sequence[Cluster]) -> Iterator[tuple[int, _Placed]]:
    """As many names as have room, those of large clusters first."""
    placed: list[_Placed] = []
    for number in sorted(range(len(clusters)), key=lambda n: -clusters[n].size):
        cluster = clusters[number]
        half = len(cluster.name) * 15 * _LETTER / 2
        x = min(max(_x(cluster.x), half + 8), _WIDTH - half - 8)
        for nudge in _NUDGES:
            box = _Placed(x, _y(cluster.y) + nudge, half)
            if not any(box.overlaps(other) for other in placed):
                placed.append(box)
                yield number, box
                break


def _card(number: int, cluster: Cluster, features: Sequence[Feature]) -> str:
    ordered = sorted(features, key=lambda f: (-(f.label_score or 0), f.index))
    entries = "".join(_entry(feature) for feature in ordered)
    return (
        f'<section id="c{number}" style="border-color:{_colour(number)}"><h2>'
        f"{_safe(cluster.name)} <small>({cluster.size})</small></h2><ol>{entries}</ol></section>"
    )


def _entry(feature: Feature) -> str:
    score = "" if feature.label_score is None else f" {feature.label_score:.2f}"
    snippet = _snippet(feature.contexts[0]) if feature.contexts else ""
    return (
        f'<li id="f{feature.index}"><b>{_safe(feature.label)}</b> <small>{feature.index}{score}'
        f"</small><br><i>{snippet}</i></li>"
    )


def _snippet(context: Context) -> str:
    start = max(0, context.peak - _SNIPPET_BEFORE)
    before = "".join(context.tokens[start : context.peak])
    after = "".join(context.tokens[context.peak + 1 : context.peak + 1 + _SNIPPET_AFTER])
    return f"{_safe(before)}<mark>{_safe(context.tokens[context.peak])}</mark>{_safe(after)}"


def _safe(text: str) -> str:
    """Nothing of a text may be markup or a control character."""
    return html.escape(visible(text))


def _colour(number: int) -> str:
    hue = number * _GOLDEN_ANGLE % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, 0.66, 0.62)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _x(x: int) -> float:
    return _EDGE + x * (_WIDTH - 2 * _EDGE) / 1000


def _y(y: int) -> float:
    return _EDGE + y * (_HEIGHT - 2 * _EDGE) / 1000
