"""Writes features with their contexts as a page of the documentation.

    python -m training.dictionary_gallery 12 88 417 > docs/dictionary_features.md

Which ones is for people to choose; what stands there is read from the index that ships.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fortpoint.features import shipped
from fortpoint.features.training import recipe as recipes
from fortpoint.features.understanding.index import Context, Feature, Index
from training.dictionary import RECIPE

_MARKS = re.compile(r"([\\`*_|<>\[\]#])")
_ACTIVE = 30  # of a hundred


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, help="instead of the one that ships")
    arguments = parser.parse_args()
    name = recipes.read(RECIPE).name
    index = Index.load(arguments.folder or shipped.ARTEFACTS / name)
    print(f"# Features of `{name}`\n")
    print(
        "Chosen by hand from what ships, and written by `training/dictionary_gallery.py`. Bold is"
    )
    print("where a feature is active at three tenths of its maximum or more.\n")
    for number in arguments.features:
        print(section(index.features[number], name))


def section(feature: Feature, name: str) -> str:
    score = "" if feature.label_score is None else f", label {feature.label_score:.2f}"
    promoted = ", ".join(_plain(effect.token.strip()) for effect in feature.promoted)
    seldom = 1 / max(feature.frequency, 1e-9)
    lines = [
        f"## {name}/{feature.index}: {_plain(feature.label)}",
        "",
        f"At one token in {seldom:,.0f}{score}. Makes likelier: {promoted}",
        "",
        *(f"- {shown(context)}" for context in feature.contexts),
        "",
    ]
    return "\n".join(lines)


def shown(context: Context) -> str:
    """The context on one line, its active words in bold."""
    parts, bold = [], False
    for token, strength in zip(context.tokens, context.strengths, strict=True):
        active = strength >= _ACTIVE
        text = _plain(token)
        if active != bold:
            mark = "**"
            lead = text[: len(text) - len(text.lstrip())] if active else ""
            parts.append(lead + mark)
            text, bold = text.removeprefix(lead), active
        parts.append(text)
    if bold:
        parts.append("**")
    return "".join(parts).strip()


def _plain(text: str) -> str:
    return _MARKS.sub(r"\\\1", text.replace("\n", "⏎"))


if __name__ == "__main__":
    main()
