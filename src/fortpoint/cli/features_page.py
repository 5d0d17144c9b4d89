"""What is known of a feature, as a page in a terminal.

Tokens of contexts are shaded by strength. Nothing of a text may act on the terminal: it is made
visible before it is printed, and never read as markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fortpoint.features.understanding.index import Context, Effect, Feature, Index, Kin
from fortpoint.features.understanding.writing import visible

_BARS = "▁▂▃▄▅▆▇█"
_KINDS = ("strongest", "middling", "weak")


def print_feature(index: Index, feature: Feature, console: Console | None = None) -> None:
    console = console or Console()
    title = f"{index.header.dictionary}/{feature.index}"
    console.print(Panel(Group(*_parts(index, feature)), title=title, title_align="left"))


def _parts(index: Index, feature: Feature) -> Iterator[RenderableType]:
    yield Text(visible(feature.label), style="bold")
    yield Text(_facts(index, feature), style="dim")
    if feature.histogram:
        yield Text(f"strength    {bars(feature.histogram)}  0 to {feature.max_activation:g}")
    yield Text()
    level = -1
    for context in feature.contexts:
        if context.level != level:
            level = context.level
            yield Text(_KINDS[min(level, len(_KINDS) - 1)], style="dim italic")
        yield shaded(context)
    yield Text()
    yield _effects("raises", feature.promoted)
    yield _effects("lowers", feature.suppressed)
    for name, kin in (
        ("points alike", feature.neighbours),
        ("reads alike", feature.encoder_neighbours),
        ("active with", feature.coactive),
    ):
        if kin:
            yield Text(name, style="dim italic")
            yield _kin(index, kin)


def _facts(index: Index, feature: Feature) -> str:
    facts = [f"active on {100 * feature.frequency:.3g} % of tokens"]
    if feature.label_score is not None:
        by = f", by {visible(feature.labeller)}" if feature.labeller else ""
        facts.append(f"label predicts unseen text: {feature.label_score:.2f}{by}")
    if feature.cluster >= 0:
        facts.append(f"cluster {visible(index.header.clusters[feature.cluster].name)}")
    return " · ".join(facts)


def bars(counts: Sequence[int]) -> str:
    """Counts as eighths of a block, the least that is not zero still to be seen."""
    top = max(counts, default=0)
    return "".join(
        " " if n == 0 else _BARS[min(len(_BARS) - 1, n * len(_BARS) // (top + 1))] for n in counts
    )


def shaded(context: Context) -> Text:
    """The tokens, each darker the stronger the feature is there."""
    text = Text("  ")
    for at, (token, strength) in enumerate(zip(context.tokens, context.strengths, strict=True)):
        style = ""
        if strength:
            style = f"black on {_amber(strength)}" + (" bold" if at == context.peak else "")
        text.append(visible(token), style=style)
    return text


def _amber(strength: int) -> str:
    """From pale to full, by hundredths."""
    green, blue = 240 - strength * 90 // 100, 210 - strength * 180 // 100
    return f"#ff{green:02x}{blue:02x}"


def _effects(name: str, effects: Sequence[Effect]) -> Text:
    text = Text(f"{name:<8}", style="dim italic")
    for effect in effects:
        text.append(f" {visible(effect.token)!r}", style="not dim not italic")
        text.append(f" {effect.logit:+.2f}", style="dim not italic")
    return text


def _kin(index: Index, kin: Sequence[Kin]) -> Table:
    table = Table.grid(padding=(0, 2))
    for other in kin:
        label = Text(visible(index.features[other.index].label), overflow="ellipsis")
        label.no_wrap = True
        table.add_row(f"  {other.index}", f"{other.closeness / 100:.2f}", label)
    return table
