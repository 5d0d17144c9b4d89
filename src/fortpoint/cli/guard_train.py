"""``fortpoint guard train``: detectors from an operator's own labelled texts.

    fortpoint guard train examples.jsonl --out detectors
    fortpoint guard train examples.jsonl --out detectors --text-only

A line is {text | messages, label, family?, cluster?}; a label is jailbreak, injection,
harmful_request, benign or benign_hard. The model runs in this process, as for ``features
harvest``. The folder holds what the guard loads, a card, and the examples' scores out of fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint.errors import InvalidRequest
from fortpoint.types import Message, Role

if TYPE_CHECKING:
    from fortpoint.cli.features_engine import OwnEngine
    from fortpoint.engine.chat import Prompt
    from fortpoint.engine.model import Floats
    from fortpoint.guard.training.examples import Example
    from fortpoint.guard.training.probes import Activations
    from fortpoint.guard.training.run import Origin, Trained

_BATCH_EXAMPLES = 32
_MAX_TOKENS = 512  # of a text; the rest of a longer one is read by the text model alone

Update = Callable[[str, int, int], None]


def train(
    examples: Annotated[Path, typer.Argument(help="JSONL: {text|messages, label, family?}.")],
    out: Annotated[Path, typer.Option("--out", help="The folder that is written.")],
    model: Annotated[str | None, typer.Option(help="As `fortpoint model list` names it.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="After which blocks to read; six of them by itself.")
    ] = None,
    false_positives: Annotated[
        float, typer.Option(help="Share of benign texts that a detector may block.")
    ] = 0.01,
    text_only: Annotated[bool, typer.Option("--text-only", help="Read no model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn detectors from labelled texts, leaving families out to say how good they are."""
    from fortpoint.cli.progress import Progress
    from fortpoint.guard.training import card, run
    from fortpoint.guard.training.examples import detectors_of, read

    if not 0.0001 <= false_positives <= 0.5:
        raise InvalidRequest("--false-positives is a share from 0.0001 to 0.5")
    rows = read(examples)
    settings = run.Settings(detectors_of(rows), false_positives)
    with Progress() as progress:
        origin, found = (None, None) if text_only else _read(rows, model, layer, progress.update)
        trained = run.train(rows, found, settings, progress.update)
    run.write(trained, out, origin, card.write(trained, origin))
    figures = _figures(trained)
    if as_json:
        typer.echo(msgspec.json.encode({"folder": str(out), **figures}).decode())
        return
    for name, one in figures["detectors"].items():
        typer.echo(
            f"{name}: AUROC {one['auroc']:.3f} on each {figures['left_out']} left out, "
            f"{one['blocked']:.1%} blocked at {one['threshold']:.4f}"
        )
    typer.echo(f"benign texts blocked: {figures['benign_blocked']:.2%}; card in {out / 'CARD.md'}")


def _figures(trained: Trained) -> dict[str, Any]:
    from fortpoint.guard.training.examples import BENIGN, such

    scored = trained.scored(trained.mode)
    detectors = {}
    for name, calibration in trained.calibrations.items():
        figures = [scored.auroc(name, such((name,), family)) for family in scored.families((name,))]
        detectors[name] = {
            "auroc": sum(figures) / len(figures),
            "blocked": scored.rate(such((name,))).share,
            "threshold": getattr(calibration, trained.mode).threshold,
        }
    return {
        "left_out": trained.parts.by,
        "examples": len(trained.examples),
        "benign_blocked": scored.rate(such(BENIGN)).share,
        "detectors": detectors,
    }


def _read(
    rows: Sequence[Example], name: str | None, layers: Sequence[int] | None, update: Update
) -> tuple[Origin, list[Activations]]:
    from fortpoint.cli.features_engine import opened
    from fortpoint.guard.training.run import Origin

    with opened(name) as engine:
        chosen = tuple(sorted(set(layers or _spread(engine.stream.n_layers))))
        engine.stream.check_layers(chosen)
        origin = Origin(engine.name, engine.digest, chosen)
        return origin, list(_activations(engine, rows, chosen, update))


def _spread(n_layers: int) -> tuple[int, ...]:
    """Six blocks from the third to the ninth tenth, where what a text asks for is seen best."""
    return tuple(
        sorted({round((0.3 + 0.1 * i) * n_layers) for i in range(6)} & set(range(n_layers)))
    )


def _activations(
    engine: OwnEngine, rows: Sequence[Example], layers: tuple[int, ...], update: Update
) -> Iterator[Activations]:
    for start in range(0, len(rows), _BATCH_EXAMPLES):
        update("read", start, len(rows))
        prompts = [_prompt(engine, row) for row in rows[start : start + _BATCH_EXAMPLES]]
        seen = engine.stream.read([prompt.tokens for prompt in prompts], layers)
        at = 0
        for prompt in prompts:
            end = at + len(prompt.tokens)
            yield _summed({layer: seen[layer][at:end] for layer in layers}, prompt)
            at = end
    update("read", len(rows), len(rows))


def _prompt(engine: OwnEngine, row: Example) -> Prompt:
    """As the server renders it, the labelled text cut to what is read inside the model."""
    room = min(_MAX_TOKENS, engine.stream.max_context // 2)
    tokens = engine.tokenizer.encode_text(row.text[: 8 * room])[:room]
    text = engine.tokenizer.decode(tokens) or row.text[:room]
    prompt = engine.tokenizer.chat([*row.before, Message(Role.USER, text)])
    if len(prompt.tokens) > engine.stream.max_context:
        prompt = engine.tokenizer.chat([Message(Role.USER, text)])
    return prompt


def _summed(seen: dict[int, Floats], prompt: Prompt) -> Activations:
    """Means over windows of the last message, and the template's last token after it."""
    import numpy as np

    from fortpoint.guard.training.probes import WINDOW_TOKENS, Activations

    x = np.stack([rows / _rms(rows) for rows in seen.values()], axis=1)
    own = [s for s in prompt.segments if s.role is not Role.TEMPLATE]
    last = max(segment.message for segment in own)
    start = min(s.start for s in own if s.message == last)
    end = max(s.end for s in own if s.message == last)
    edges = range(start, end, WINDOW_TOKENS)
    windows = [x[edge : min(edge + WINDOW_TOKENS, end)].mean(0) for edge in edges]
    tail = x[-1] if end < len(x) else windows[-1]
    return Activations(np.stack(windows).astype(np.float16), tail.astype(np.float16), end - start)


def _rms(rows: Floats) -> Floats:
    import numpy as np

    found: Floats = np.sqrt(np.mean(rows * rows, axis=1, keepdims=True) + 1e-6)
    return found
