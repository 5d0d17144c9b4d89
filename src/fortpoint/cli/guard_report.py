"""``fortpoint guard report``: how good trained detectors are, as one page.

    fortpoint guard report detectors --out report.html

``detectors`` is the folder that ``fortpoint guard train`` wrote. The page holds excerpts of the
examples: keep it where they are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer


def report(
    folder: Annotated[Path, typer.Argument(help="What `fortpoint guard train` wrote.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; report.html in the folder by itself.")
    ] = None,
    n: Annotated[int, typer.Option(help="How many misses and false alarms.", min=1, max=500)] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw ROC curves, tables by family, the worst misses and the worst false alarms."""
    from fortpoint.guard.training import report as page

    scores = page.read(folder / "scores.jsonl")
    figures = page.figures(scores, n)
    path = out or folder / "report.html"
    page.write(path, scores, figures)
    if as_json:
        typer.echo(
            msgspec.json.encode({"report": str(path), **msgspec.to_builtins(figures)}).decode()
        )
        return
    for one in figures.detectors:
        typer.echo(f"{one.detector}: mean AUROC {one.auroc:.3f} over {len(one.families)} families")
    typer.echo(f"report in {path}")
