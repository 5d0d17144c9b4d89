"""The report of a trained dictionary: one HTML page with its figures and plots in it.

Everything is inside the file: no script, nothing from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fortpoint import plot
from fortpoint.errors import StorageError
from fortpoint.features.training.checkpoint import Measured, Run, write_whole
from fortpoint.features.training.measure import Losses, Passed

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b2733; }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
       border-bottom: 1px solid #dde3e8; font-variant-numeric: tabular-nums; vertical-align: top }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.plots svg { width: 100%; height: auto } small { color: #5a6b7a }
"""


def quality_of(passed: Passed, losses: Losses | None) -> dict[str, float | int]:
    """The figures of a dictionary by name."""
    found: dict[str, float | int] = {
        "tokens measured": passed.n_tokens,
        "EV": passed.explained,
        "EV with sinks": passed.explained_with_sinks,
        "L0": passed.l0,
        "dead share": passed.dead_share,
    }
    if losses is not None:
        found |= {
            "loss": losses.clean,
            "loss with reconstruction": losses.replaced,
            "loss rises by": losses.rise,
            "loss with zeros": losses.zeroed,
            "loss with the mean": losses.averaged,
            "CE recovered, zeros": losses.recovered_against_zero,
            "CE recovered, mean": losses.recovered_against_mean,
        }
    return found


def write(
    path: Path,
    name: str,
    run: Run,
    metrics: Sequence[Measured],
    passed: Passed,
    quality: Mapping[str, float | int],
) -> None:
    """Raises ``StorageError``."""
    settings = run.settings
    about = {
        "model": run.harvest.model,
        "layer": run.layer,
        "architecture": settings.architecture,
        "features": settings.d_sae,
        "k": settings.k,
        "steps": run.n_steps,
        "tokens seen": run.n_steps * settings.batch * run.n_ranks,
        "harvested tokens": run.harvest.n_tokens,
        "learning rate": settings.rate,
        "model digest": run.harvest.digest,
    }
    body = (
        f"<h1>Dictionary {html.escape(name)}</h1>"
        "<h2>On text that it never saw, attention sinks left out</h2>"
        f"{_table(quality)}"
        f'<h2>Learning</h2><div class="plots">{_learning(metrics)}</div>'
        f'<h2>Features</h2><div class="plots">{_features(passed)}</div>'
        f"<h2>How it was made</h2>{_table(about)}"
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style>{body}</html>"
    )
    try:
        write_whole(path, page.encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_shown(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _learning(metrics: Sequence[Measured]) -> str:
    millions = [one.tokens / 1e6 for one in metrics]

    def explained(axes: Any) -> None:
        axes.plot(millions, [1 - one.fvu for one in metrics], color="#0b6e99")
        axes.set_title("explained variance of the batches learned from")

    def sparsity(axes: Any) -> None:
        axes.plot(millions, [one.l0 for one in metrics], color="#0b6e99")
        axes.set_title("active features a token (L0)")

    def dead(axes: Any) -> None:
        axes.plot(millions, [one.n_dead for one in metrics], color="#b3431e")
        axes.set_title("features not active of late")

    def speed(axes: Any) -> None:
        axes.plot(millions, [one.tokens_per_s for one in metrics], color="#4a7c59")
        axes.set_ylim(bottom=0)
        axes.set_title("tokens a second")

    plots = (explained, sparsity, dead, speed)
    return "".join(plot.svg(draw, "million tokens") for draw in plots)


def _features(passed: Passed) -> str:
    live = passed.frequency[passed.frequency > 0]

    def density(axes: Any) -> None:
        axes.hist(np.log10(live), bins=60, color="#0b6e99")
        axes.set_title("how often features are active (share of tokens, log10)")

    def maxima(axes: Any) -> None:
        axes.hist(passed.maximum[passed.maximum > 0], bins=60, color="#4a7c59")
        axes.set_title("largest activation of each feature")

    return plot.svg(density, "log10 frequency") + plot.svg(maxima, "activation")
