"""Small pictures for reports: SVG that stands in an HTML page, the same for the same figures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any


def svg(draw: Callable[[Any], None], label: str, height: float = 2.9) -> str:
    """What ``draw`` puts on matplotlib's axes; ``label`` is the horizontal one, ``height`` in
    inches beside a width of 5.4."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fortpoint", "font.size": 9}):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", target.getvalue(), flags=re.DOTALL)
