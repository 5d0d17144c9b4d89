"""Fits the law of the dictionaries that ``dictionary_sweep`` tried, and draws it.

    python -m training.dictionary_law sweep.jsonl --svg docs/figures/dictionary_law.svg [--json]

FVU on text that no dictionary saw, against width and tokens, at a fixed number of active
features: points are runs, lines the law, bands its 95 % interval. What it foresees for the
shipped recipe stands beside what that run measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fortpoint.features.training import recipe as recipes
from fortpoint.features.training import scaling
from training import dictionary_sweep
from training.dictionary import RECIPE
from training.dictionary_sweep import Tried

_N_DRAWN = 60


def main() -> None:
    arguments = _arguments()
    tried = dictionary_sweep.read(arguments.sweep)
    widths = [one.case.settings.d_sae for one in tried]
    law = scaling.fit(widths, [one.tokens for one in tried], [one.fvu for one in tried])
    found = _found(law, tried)
    if arguments.svg:
        _draw(law, tried, arguments.svg)
    if arguments.json:
        print(msgspec.json.encode(found).decode())
        return
    for name, value in found.items():
        print(f"{name:<28} {value}")


def _found(law: scaling.Law, tried: list[Tried]) -> dict[str, Any]:
    recipe = recipes.read(RECIPE)
    width, tokens = recipe.training.d_sae, recipe.training.epochs * recipe.harvest.tokens
    low, high = law.interval(width, tokens)

    def spread(which: int, value: float) -> list[float]:
        return [round(value, 4), *(round(edge, 4) for edge in law.spread(which))]

    return {
        "runs": len(tried),
        "layer": sorted({one.case.layer for one in tried}),
        "active": sorted({one.case.settings.k for one in tried}),
        "widths": sorted({one.case.settings.d_sae for one in tried}),
        "tokens": sorted({one.tokens for one in tried}),
        "floor": round(law.floor, 4),
        "alpha (width)": spread(2, law.alpha),
        "beta (tokens)": spread(4, law.beta),
        "residual, in log FVU": round(law.residual, 4),
        f"foreseen at {width}, {tokens:g}": [
            round(value, 4) for value in (law.fvu(width, tokens), low, high)
        ],
    }


def _draw(law: scaling.Law, tried: list[Tried], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fort-point"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    tokens = np.array([one.tokens for one in tried], float)
    reach = np.geomspace(tokens.min() / 1.3, tokens.max() * 4, _N_DRAWN)
    for width in sorted({one.case.settings.d_sae for one in tried}):
        own = [one for one in tried if one.case.settings.d_sae == width]
        (line,) = axes.plot(reach, [law.fvu(width, t) for t in reach], lw=1.2)
        bands = np.array([law.interval(width, t) for t in reach])
        axes.fill_between(reach, bands[:, 0], bands[:, 1], color=line.get_color(), alpha=0.15)
        axes.plot(
            [one.tokens for one in own],
            [one.fvu for one in own],
            "o",
            ms=4,
            color=line.get_color(),
            label=f"{width:,} features",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens learned from", ylabel="FVU, unseen text")
    axes.legend(frameon=False)
    axes.grid(visible=True, which="both", alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="what dictionary_sweep wrote")
    parser.add_argument("--svg", type=Path, help="draw it there")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
