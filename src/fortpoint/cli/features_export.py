"""``fortpoint features export`` and ``import``: dictionaries and features in others' formats.

fortpoint features export smollm2-135m-l15 --format saelens --out out/l15
fortpoint features export smollm2-135m-l15 --format neuronpedia --out out/15-res-fortpoint
fortpoint features export golden-gate --format gguf --strength 6 --out bridge.gguf
fortpoint features import downloads/blocks.15 --name theirs
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint import config as configuration
from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.home import Home

if TYPE_CHECKING:
    from fortpoint.features.library import Library

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str | None, typer.Option(help="As `fortpoint model list` names it.")]


class Format(StrEnum):
    saelens = "saelens"
    neuronpedia = "neuronpedia"
    gguf = "gguf"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Served:
    """The model that features are of, without its weights."""

    name: str
    digest: str
    model_type: str
    d_model: int
    n_layers: int


def export(
    target: Annotated[
        str,
        typer.Argument(help="A dictionary's name; for gguf a feature (name/12) or a direction."),
    ],
    out: Annotated[Path, typer.Option("--out", help="A folder, for gguf a file, to be made.")],
    kind: Annotated[Format, typer.Option("--format", help="Whose format.")] = Format.saelens,
    precision: Annotated[
        Precision, typer.Option(help="Of the two matrices that saelens gets.")
    ] = Precision.float32,
    strength: Annotated[
        float, typer.Option(help="What a gguf adds at scale 1, in training maxima.")
    ] = 1.0,
    model_name: Annotated[
        str | None, typer.Option(help="What others call the model, if not as it is here.")
    ] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Write a dictionary, what is known of its features, or a control vector for other tools."""
    if out.is_symlink() or out.exists():
        raise InvalidRequest(f"{out} is there already; choose another place or delete it")
    config = configuration.load()
    home = Home(config.home_path)
    served = read_served(home, model or config.engine.model)
    library = _library(home, served)
    wrote: dict[str, Any] = {"target": target, "format": kind.value, "path": str(out)}
    shown = model_name or served.name
    if kind is Format.gguf:
        wrote |= _export_gguf(library, target, out, strength, served)
    elif kind is Format.neuronpedia:
        wrote |= _export_neuronpedia(home, library, target, out, shown, served)
    else:
        wrote |= _export_saelens(library, target, out, shown, precision)
    _say(wrote, f"{target} as {kind.value}: {out}", as_json)


def import_(
    folder: Annotated[Path, typer.Argument(help="As SAELens 6 writes it.")],
    name: Annotated[str, typer.Option("--name", help="What it will be called here.")],
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Take in a dictionary that fits the model; the server has it from its next start on."""
    from fortpoint.features.exchange import saelens

    config = configuration.load()
    home = Home(config.home_path)
    home.make()
    served = read_served(home, model or config.engine.model)
    taken = saelens.take(folder, home.features, name, served.d_model, served.n_layers)
    made_for = saelens.described_model(home.features / name)
    found = {
        "name": name,
        "layer": taken.layer,
        "n_features": taken.n_features,
        "made_for": made_for,
        "path": str(home.features / name),
    }
    says = f"; it says that it was made for {made_for!r}" if made_for else ""
    _say(found, f"{name}: {taken.n_features} features of layer {taken.layer}{says}", as_json)


def read_served(home: Home, model: str) -> Served:
    """Raises ``ModelError`` when the model is not here or does not say its size."""
    from fortpoint.engine.architecture import read_config
    from fortpoint.vault.model_folder import list_models, model_path

    path = model_path(home.path, model)
    found = [one.manifest for one in list_models(home.path) if one.path == path]
    if not found:
        raise ModelError(
            f"model {model!r} is not here; fetch it with `fortpoint model pull {model}`"
        )
    config = read_config(path)
    config = config.get("text_config", config)
    try:
        return Served(
            name=model,
            digest=found[0].digest,
            model_type=msgspec.convert(config["model_type"], str),
            d_model=msgspec.convert(config["hidden_size"], int),
            n_layers=msgspec.convert(config["num_hidden_layers"], int),
        )
    except (KeyError, TypeError, msgspec.ValidationError):
        raise ModelError(f"config.json of model {model} does not say its size") from None


def _library(home: Home, served: Served) -> Library:
    from fortpoint.features.library import Library
    from fortpoint.features.shipped import made_for

    shipped = made_for(served.digest)
    return Library.load(home.features, served.d_model, served.n_layers, shipped)


def _export_saelens(
    library: Library, target: str, out: Path, model_name: str, precision: Precision
) -> dict[str, Any]:
    from fortpoint.features.exchange import saelens

    dictionary = library.dictionary(target)
    saelens.write(dictionary, out, model_name, precision.value)
    return {"n_features": dictionary.n_features, "precision": precision.value}


def _export_gguf(
    library: Library, target: str, out: Path, strength: float, served: Served
) -> dict[str, Any]:
    from fortpoint.features.exchange import control_vector

    found = library.resolve(target)
    control_vector.write(out, found, strength, served.model_type)
    return {"layer": found.layer, "strength": strength}


def _export_neuronpedia(
    home: Home, library: Library, target: str, out: Path, model_name: str, served: Served
) -> dict[str, Any]:
    from fortpoint.cli.progress import Progress
    from fortpoint.features.exchange import neuronpedia
    from fortpoint.features.understanding.index import Index

    dictionary = library.dictionary(target)
    index = Index.load(_folder(home, served, target), dictionary.n_features)
    source = neuronpedia.Source(model_name, "res-fortpoint", served.n_layers)
    with Progress() as progress:
        written = neuronpedia.write(out, dictionary, index, source, progress.update)
    return asdict(written)


def _folder(home: Home, served: Served, name: str) -> Path:
    """Of a dictionary that was loaded: the home's own, or one that is shipped."""
    from fortpoint.features.sae import CONFIG
    from fortpoint.features.shipped import made_for

    own = home.features / name
    if (own / CONFIG).exists():
        return own
    return next(path for path in made_for(served.digest) if path.name == name)


def _say(found: dict[str, Any], line: str, as_json: bool) -> None:
    typer.echo(msgspec.json.encode(found).decode() if as_json else line)
