"""``fortpoint features concept`` and ``sweep``: a concept from sentences, and how far to turn it.

    fortpoint features concept golden-gate --positives bridge.txt
    fortpoint features sweep golden-gate --term "golden gate" --term "san francisco"

    fortpoint features concept gate --positives bridge.txt --each-layer --layer 9 --layer 14
    fortpoint features sweep gate-9 gate-14 --strength 0.5 --strength 0.7

Both run the model in this process. A running server has what was written after its next start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint.cli.progress import Progress
from fortpoint.errors import InvalidRequest

if TYPE_CHECKING:
    from fortpoint.engine.offline import Offline
    from fortpoint.features.concepts.learn import Concept, Settings
    from fortpoint.features.concepts.quality import Interval
    from fortpoint.features.concepts.sweep import Point, Present, Report

STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_WEAK_AUROC = 0.9

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str | None, typer.Option(help="As `fortpoint model list` names it.")]


class Mode(StrEnum):
    clamp = "clamp"
    add = "add"


class Scope(StrEnum):
    all = "all"
    answer = "answer"


def concept(
    name: Annotated[str, typer.Argument(help="What requests will call it.")],
    positives: Annotated[
        Path, typer.Option(help="Five to twenty sentences about it, one a line; or JSONL {text}.")
    ],
    negatives: Annotated[
        Path | None, typer.Option(help="Sentences that are near it, but not it.")
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Look here only; may be given again.")
    ] = None,
    each_layer: Annotated[
        bool,
        typer.Option("--each-layer", help="Make NAME-LAYER for each --layer, to turn together."),
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite one of the name.")] = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Learn a direction and a detector from a few sentences."""
    from fortpoint import config as configuration
    from fortpoint.cli.features_engine import opened
    from fortpoint.features.concepts import direction_files, examples
    from fortpoint.features.concepts.learn import learn
    from fortpoint.home import Home

    features = Home(configuration.load().home_path).features
    wanted = _wanted(name, sorted(set(layer or ())), each_layer=each_layer)
    for own in wanted:
        direction_files.check_free(features, own, replace=replace)
    given = examples.read(positives, negatives)
    made: list[dict[str, Any]] = []
    with opened(model) as engine, Progress() as progress:
        engine.stream.check_layers(sorted(set(layer or ())))
        for own, settings in wanted.items():
            found = learn(given, engine.tokenizer, engine.stream, settings, progress.update)
            described = direction_files.card(found, given, settings, engine.name, engine.digest)
            card = direction_files.write(features, own, found, described)
            made.append({"name": own, "card": str(card), **described})
            if not as_json:
                _show_concept(own, found, card)
    if as_json:
        _print_json(made if each_layer else made[0])


def sweep(
    name: Annotated[list[str], typer.Argument(help="Directions or features, turned together.")],
    term: Annotated[
        list[str] | None,
        typer.Option(help="A word that shows the concept in an answer; else it is read."),
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="To try; may be given again.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="How it is turned.")] = Mode.clamp,
    scope: Annotated[Scope, typer.Option(help="Prompt and answer, or the answer.")] = Scope.all,
    questions: Annotated[
        Path | None, typer.Option(help="Questions, one a line; neutral ones otherwise.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Of an answer.")] = 60,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Find the strength at which the concept appears and the text stays sane."""
    from fortpoint.engine.steered_answers import SteeredAnswers
    from fortpoint.features.concepts import background, examples
    from fortpoint.features.concepts.sweep import Setting
    from fortpoint.features.concepts.sweep import sweep as find

    asked = background.questions() if questions is None else examples.read_lines(questions)
    settings = [Setting(tuple(name), one, mode.value, scope.value) for one in strength or STRENGTHS]
    with _offline(model, name) as engine, Progress() as progress:
        present = _present(engine, name[0], term or ())
        answers = SteeredAnswers(engine, max_tokens)
        report = find(answers, asked, settings, present, progress.update)
    if as_json:
        _print_json(msgspec.to_builtins(report))
    else:
        _show_report(report)


def _wanted(name: str, layers: Sequence[int], *, each_layer: bool) -> dict[str, Settings]:
    """What is to be made, by name. Raises ``InvalidRequest``."""
    from fortpoint.features.concepts.learn import Settings

    if not each_layer:
        return {name: Settings(layers=tuple(layers) or None)}
    if not layers:
        raise InvalidRequest("name the layers for --each-layer with --layer", param="layer")
    return {f"{name}-{layer}": Settings(layers=(layer,)) for layer in layers}


@contextmanager
def _offline(name: str | None, targets: Sequence[str]) -> Iterator[Offline]:
    """Raises ``InvalidRequest`` for a target that is not there."""
    from fortpoint import config as configuration
    from fortpoint.engine.chat import ChatTokenizer
    from fortpoint.engine.loading import load_model
    from fortpoint.engine.offline import Offline
    from fortpoint.features.library import Library
    from fortpoint.features.shipped import made_for
    from fortpoint.home import Home
    from fortpoint.vault.model_folder import model_path, open_model

    config = configuration.load()
    folder = open_model(model_path(config.home_path, name or config.engine.model))
    model = load_model(folder.path, config.engine)
    with ExitStack() as stack:
        stack.callback(model.close)
        shipped = made_for(folder.manifest.digest)
        features = Home(config.home_path).features
        library = Library.load(features, model.d_model, model.n_layers, shipped)
        for target in targets:
            library.resolve(target)
        engine = Offline(model, ChatTokenizer.load(folder.path), library, config.engine)
        stack.callback(engine.close)
        yield engine


def _present(engine: Offline, target: str, terms: Sequence[str]) -> Present:
    from fortpoint.features.concepts.sweep import by_reading, by_terms

    if terms:
        return by_terms(terms)
    return by_reading(engine.library.resolve(target), engine.tokenizer, engine.stream)


def _show_concept(name: str, found: Concept, card: Path) -> None:
    quality = found.quality
    typer.echo(
        f"{name}: layer {found.layer}, of {len(found.layers)} tried\n"
        f"  told apart    AUROC {_interval(quality.auroc)}\n"
        f"  found         {_percent(quality.recall)} of {quality.n_positives} held-out examples\n"
        f"  false alarms  {_percent(quality.false_positive_rate)} of {quality.n_others} others\n"
        f"  {card}"
    )
    if quality.auroc.low < _WEAK_AUROC:
        typer.echo(
            "The model hardly tells it apart: give more examples, or negatives that show what "
            "it is not.",
            err=True,
        )


def _show_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("strength", "present", "perplexity", "ratio", "distinct", "an answer")
    for point in (report.own, *report.points):
        table.add_row(*_cells(point))
    Console().print(table)
    best = report.recommended
    if best is None:
        typer.echo("No strength here is both present and sane; try others, or another layer.")
    else:
        typer.echo(
            f"Use strength {best.setting.strength:g}: present in {best.present.value:.0%}, "
            f"perplexity {best.ratio:.1f} times the model's own."
        )


def _cells(point: Point) -> tuple[str, ...]:
    shown = point.examples[0].replace("\n", " ")[:60]
    return (
        f"{point.setting.strength:g}" if point.setting.targets else "none",
        _percent(point.present),
        f"{point.perplexity:.2f}",
        f"{point.ratio:.2f}",
        f"{point.distinct:.2f}",
        shown,
    )


def _interval(figure: Interval) -> str:
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _percent(figure: Interval) -> str:
    return f"{figure.value:.0%} [{figure.low:.0%}, {figure.high:.0%}]"


def _print_json(value: Any) -> None:
    typer.echo(msgspec.json.encode(value).decode())
