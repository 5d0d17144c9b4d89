"""``fortpoint features``: learn what a model thinks in, name it, find it, watch it.

    fortpoint features harvest text.jsonl.gz --layer 15 --out activations
    fortpoint features train activations --layer 15 --name mine
    fortpoint features train --recipe recipe.toml

Harvesting and measuring run the model in this process, on the operator's own account: raw
activations say what a text was, so keep them where the weights are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint.cli import (
    feature_alerts,
    features_concept,
    features_export,
    features_label,
    features_understand,
)
from fortpoint.cli.progress import Progress
from fortpoint.errors import InvalidRequest

if TYPE_CHECKING:
    from fortpoint.features.training.settings import Settings

app = typer.Typer(help="Learn, name, find and watch a model's features.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str | None, typer.Option(help="As `fortpoint model list` names it.")]


@app.command("harvest")
def harvest(
    texts: Annotated[list[Path], typer.Argument(help="JSONL of {text} or {messages}, or .gz.")],
    layer: Annotated[list[int], typer.Option(help="Layer to keep; may be given again.")],
    out: Annotated[Path, typer.Option(help="Folder; a harvest that stopped goes on there.")],
    tokens: Annotated[int, typer.Option(help="Tokens at most; 0 takes all text.")] = 0,
    context: Annotated[int, typer.Option(help="Tokens that see each other.")] = 512,
    max_gib: Annotated[float, typer.Option(help="Gibibytes at most on disk.")] = 32.0,
    seed: Annotated[int, typer.Option(help="Of the order of texts.")] = 0,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Keep the residual stream of texts, to learn features from."""
    from fortpoint.cli.features_engine import Harvesting, opened

    with opened(model) as engine, Progress() as progress:
        wish = Harvesting(tuple(layer), tokens, context, max_gib, seed)
        store = engine.harvest(texts, wish, out, progress.update)
    found = {"folder": str(out), "tokens": store.n_tokens, "shards": len(store.shards)}
    if as_json:
        print_json({**found, "layers": list(layer)})
    else:
        typer.echo(f"{store.n_tokens:,} tokens in {len(store.shards)} shards: {out}")


@app.command("train")
def train(
    harvest: Annotated[
        Path | None, typer.Argument(help="Folder of `features harvest`; not with --recipe.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of the harvest; its only one.")] = None,
    name: Annotated[str, typer.Option(help="Of the dictionary.")] = "mine",
    recipe: Annotated[Path | None, typer.Option(help="TOML that says everything.")] = None,
    architecture: Annotated[
        str, typer.Option(help="batchtopk, topk, jumprelu or matryoshka.")
    ] = "batchtopk",
    width: Annotated[int, typer.Option(help="Features to learn.")] = 4608,
    k: Annotated[int, typer.Option(help="Active at a token, on average.")] = 40,
    epochs: Annotated[float, typer.Option(help="Times through the text.")] = 1.0,
    held_out: Annotated[int, typer.Option(help="Shards kept apart to measure on.")] = 2,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the run; home/training/NAME by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn a dictionary, measure it on text it never saw, and put it among the features."""
    from fortpoint.cli import features_training

    if (recipe is None) == (harvest is None):
        raise InvalidRequest("name a harvest's folder, or a recipe with --recipe")
    if recipe is not None:
        made = features_training.follow(recipe, work)
    else:
        assert harvest is not None  # noqa: S101
        settings = _settings(architecture, width, k, epochs)
        made = features_training.train_on(harvest, layer, name, settings, held_out, work)
    if made is None:  # not the leading process of several
        return
    if as_json:
        print_json({"folder": str(made.folder), "report": str(made.report), **made.quality})
        return
    for key, value in made.quality.items():
        typer.echo(f"{key:<24} {value:.4f}" if isinstance(value, float) else f"{key:<24} {value}")
    typer.echo(f"dictionary  {made.folder}\nreport      {made.report}")


app.command("list")(features_understand.list_features)
app.command("describe")(features_understand.describe)
app.command("show")(features_understand.show)
app.command("search")(features_understand.search)
app.command("label")(features_label.label)
app.command("cluster")(features_understand.cluster)
app.command("concept")(features_concept.concept)
app.command("sweep")(features_concept.sweep)
app.command("export")(features_export.export)
app.command("import")(features_export.import_)
app.command("alerts")(feature_alerts.alerts)
app.command("stats")(feature_alerts.stats)


def print_json(value: Any) -> None:
    typer.echo(msgspec.json.encode(value).decode())


def _settings(architecture: str, width: int, k: int, epochs: float) -> Settings:
    from fortpoint.features.training.settings import Settings

    tree: dict[str, Any] = {
        "architecture": architecture,
        "d_sae": width,
        "k": k,
        "epochs": epochs,
    }
    if architecture == "matryoshka":
        tree["prefixes"] = [width // 16, width // 4]
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    settings.check()
    return settings
