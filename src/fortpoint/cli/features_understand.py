"""``fortpoint features describe``, ``show``, ``search``, ``list``, ``cluster``.

    fortpoint features describe mine --harvest activations
    fortpoint features search "golden gate bridge"
    fortpoint features show smollm2-135m-l15/417

``describe`` writes ``understanding.jsonl.gz`` and ``map.html`` beside the dictionary. A
dictionary is named as the server names it, or by its folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from fortpoint import config as configuration
from fortpoint.cli.progress import Progress
from fortpoint.errors import FortPointError, InvalidRequest, NotFound
from fortpoint.home import Home

if TYPE_CHECKING:
    from fortpoint.features.activations import ActivationStore
    from fortpoint.features.sae import Dictionary
    from fortpoint.features.understanding.describe import Model
    from fortpoint.features.understanding.index import Index
    from fortpoint.features.understanding.search import Hit

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Named = Annotated[str, typer.Argument(metavar="DICTIONARY", help="Its name, or its folder.")]

_MAX_TEXT_CHARS = 100_000
_ANY_LAYER = 4096  # the harvest says which layers there are


@dataclass(frozen=True)
class Place:
    """Where a dictionary lies."""

    name: str
    folder: Path
    shipped: bool


def describe(
    dictionary: Named,
    harvest: Annotated[Path, typer.Option(help="Folder of `features harvest`.")],
    held_out: Annotated[
        int, typer.Option(min=0, help="Shards at the end that judge the labels.")
    ] = 4,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens to read; 0 reads all.")] = 0,
    compact: Annotated[
        bool, typer.Option("--compact", help="Keep less of each feature: a quarter of the bytes.")
    ] = False,
    clusters: Annotated[int, typer.Option(min=0, help="How many; 0 goes by the features.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the index; the dictionary's own by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out what a dictionary's features mean, and keep it beside them."""
    from dataclasses import replace

    from fortpoint.features.sae import WEIGHTS
    from fortpoint.features.understanding import describe as describing
    from fortpoint.features.understanding import map_page
    from fortpoint.features.understanding import survey as surveying
    from fortpoint.features.understanding.index import digest_of

    place, store, loaded = opened_with(dictionary, harvest)
    settings = replace(
        describing.COMPACT if compact else describing.Settings(),
        survey=surveying.Settings(n_held_out=held_out, n_tokens=tokens or None),
        n_clusters=clusters or None,
    )
    digest = digest_of(place.folder / WEIGHTS)
    model = model_of(store)
    with Progress() as progress:
        index = describing.describe(store, loaded, digest, model, settings, progress.update)
    folder = out or place.folder
    path = index.save(folder)
    map_page.write(index, folder / map_page.FILE)
    header = index.header
    found = {
        "index": str(path),
        "bytes": path.stat().st_size,
        "map": str(folder / map_page.FILE),
        **_figures(header),
    }
    score = "none could be judged" if header.mean_score is None else f"{header.mean_score:.3f}"
    alive = header.n_features - header.n_dead
    _say(
        found,
        as_json,
        f"{alive} live features, {header.n_dead} dead; labels predict unseen text: {score} "
        f"({header.n_judged} judged)\nindex  {path}\nmap    {folder / map_page.FILE}",
    )


def show(
    target: Annotated[str, typer.Argument(metavar="DICTIONARY/INDEX", help="One feature.")],
    as_json: Json = False,
) -> None:
    """Print what is known of a feature."""
    from fortpoint.cli.features_page import print_feature
    from fortpoint.features.understanding.index import Index, plain

    name, slash, number = target.rpartition("/")
    if not slash or not (number.isascii() and number.isdigit() and len(number) <= 7):
        raise InvalidRequest("name one feature, as in smollm2-135m-l15/417")
    index = Index.load(find(name).folder)
    if int(number) >= len(index.features):
        raise InvalidRequest(f"{name} has the features 0 to {len(index.features) - 1}")
    feature = index.features[int(number)]
    if as_json:
        _say({"dictionary": index.header.dictionary, **plain(feature)}, as_json, "")
    else:
        print_feature(index, feature)


def search(
    words: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="An example: what is active in it? Runs the model.")
    ] = None,
    dictionary: Annotated[
        str | None, typer.Option("--in", metavar="DICTIONARY", help="Only there.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 10,
    as_json: Json = False,
) -> None:
    """Find features by words, or by a text that makes them active."""
    if (words is None) == (text is None):
        raise InvalidRequest("give words to look for, or an example with --text")
    if len(words or text or "") > _MAX_TEXT_CHARS:
        raise InvalidRequest(f"an example has at most {_MAX_TEXT_CHARS} characters")
    places = [find(dictionary)] if dictionary is not None else list(_described())
    if not places:
        raise NotFound(
            "no dictionary here has an index; make one with `fortpoint features describe`"
        )
    found = []
    for place in places:
        index = _index(place)
        hits = (
            _by_words(index, words, top) if words is not None else _by_text(place, index, text, top)
        )
        found += [(place.name, index.features[hit.feature], hit.score) for hit in hits]
    found = sorted(found, key=lambda item: -item[2])[:top]
    rows = [
        {
            "feature": f"{name}/{feature.index}",
            "label": feature.label,
            "label_score": feature.label_score,
            "frequency": feature.frequency,
            "score": score,
        }
        for name, feature, score in found
    ]
    _print_rows(rows, ("feature", "score", "label"), "nothing found", as_json)


def list_features(as_json: Json = False) -> None:
    """Name the dictionaries and directions that the model can be read and steered by."""
    from fortpoint.cli.features_export import read_served
    from fortpoint.features.library import Library
    from fortpoint.features.shipped import made_for

    config = configuration.load()
    home = Home(config.home_path)
    served = read_served(home, config.engine.model)
    shipped = made_for(served.digest)
    library = Library.load(home.features, served.d_model, served.n_layers, shipped)
    rows: list[dict[str, Any]] = []
    for name, held in library.dictionaries.items():
        place = find(name)
        rows.append(
            {
                "name": name,
                "kind": "dictionary",
                "layer": held.layer,
                "features": held.n_features,
                "from": "shipped" if place.shipped else "home",
                **_described_by(place),
            }
        )
    for name, direction in library.directions.items():
        rows.append(
            {"name": name, "kind": "direction", "layer": direction.layer, "features": 1,
             "from": "home"}
        )  # fmt: skip
    rows += [
        {"name": name, "kind": "left out", "reason": reason}
        for name, reason in library.left_out.items()
    ]
    columns = ("name", "kind", "layer", "features", "from", "labels", "reason")
    _print_rows(rows, columns, "none; learn some with `fortpoint features train`", as_json)


def cluster(
    dictionary: Named,
    harvest: Annotated[Path, typer.Option(help="Folder of `features harvest`.")],
    clusters: Annotated[int, typer.Option(min=0, help="How many; 0 goes by the features.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to see company on.")] = 300_000,
    seed: Annotated[int, typer.Option(help="Of the grouping and the map.")] = 0,
    as_json: Json = False,
) -> None:
    """Group a dictionary's features anew, and draw the map again."""
    from fortpoint.features.understanding import describe as describing
    from fortpoint.features.understanding import map_page
    from fortpoint.features.understanding import survey as surveying
    from fortpoint.features.understanding.index import Index

    place, store, loaded = opened_with(dictionary, harvest)
    index = Index.load(place.folder, loaded.n_features)
    settings = surveying.Settings(n_held_out=0, n_tokens=tokens, study_tokens=tokens)
    with Progress() as progress:
        part = surveying.survey(store, loaded, settings, progress.update).study
        index = describing.recluster(index, loaded, part, clusters or None, seed)
    index.save(place.folder)
    path = place.folder / map_page.FILE
    map_page.write(index, path)
    rows = [
        {"cluster": number, "name": one.name, "features": one.size}
        for number, one in enumerate(index.header.clusters)
    ]
    _print_rows(rows, ("cluster", "features", "name"), "no feature is active", as_json)
    typer.echo(f"map  {path}", err=True)


def find(name: str) -> Place:
    """The dictionary of this name or in this folder. Raises ``NotFound``."""
    from fortpoint.features.sae import CONFIG
    from fortpoint.features.shipped import ARTEFACTS

    plain_name = bool(name) and Path(name).name == name and name not in {".", ".."}
    if plain_name:
        own = Home(configuration.load().home_path).features / name
        for folder, shipped in ((own, False), (ARTEFACTS / name, True)):
            if (folder / CONFIG).is_file():
                return Place(name, folder, shipped)
    folder = Path(name)
    if name and (folder / CONFIG).is_file():
        return Place(folder.resolve().name, folder, False)
    raise NotFound(f"there is no dictionary {name[:200]!r}; `fortpoint features list` names them")


def model_of(store: ActivationStore) -> Model:
    """The model that was harvested: its tokens' texts and its unembedding.

    Raises ``ModelError`` when it is not here or another one lies under its name.
    """
    from fortpoint.cli.features_engine import check_digest
    from fortpoint.engine.unembedding import read_unembedding
    from fortpoint.features.understanding.describe import Model
    from fortpoint.vault.model_folder import model_path, open_model

    folder = open_model(model_path(configuration.load().home_path, store.plan.model))
    check_digest(folder, store.plan.digest)
    readout = read_unembedding(folder.path)
    texts = token_texts(folder.path, len(readout))
    return Model(store.plan.model, store.plan.digest, texts, readout)


def token_texts(folder: Path, n_vocab: int) -> tuple[str, ...]:
    """Of every token id, special ones by their names."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [[number] for number in range(n_vocab)]
    return tuple(tokenizer.decode_batch(ids, skip_special_tokens=False))


def opened_with(name: str, harvest: Path) -> tuple[Place, ActivationStore, Dictionary]:
    """The dictionary, and the harvest to read it on. Raises ``NotFound``, ``ModelError``."""
    from fortpoint.features.activations import ActivationStore
    from fortpoint.features.sae import Dictionary

    place, store = find(name), ActivationStore(harvest)
    loaded = Dictionary.load(place.folder, store.plan.d_model, _ANY_LAYER)
    store.check_layer(loaded.layer)
    return place, store, loaded


def _described() -> Iterator[Place]:
    """All dictionaries that have an index, the home's own before those shipped for its model."""
    from fortpoint.features.understanding.index import FILE

    own = Home(configuration.load().home_path).features
    folders = [(path.parent, False) for path in sorted(own.glob(f"*/{FILE}"))]
    folders += [(folder, True) for folder in _shipped() if (folder / FILE).is_file()]
    seen: set[str] = set()
    for folder, shipped in folders:
        if folder.name not in seen:
            seen.add(folder.name)
            yield Place(folder.name, folder, shipped)


def _shipped() -> tuple[Path, ...]:
    """Those for the model that this home serves; all of them where it has none yet."""
    from fortpoint.cli.features_export import read_served
    from fortpoint.features.shipped import ARTEFACTS, MODEL, made_for

    config = configuration.load()
    try:
        served = read_served(Home(config.home_path), config.engine.model)
    except FortPointError:
        return tuple(path.parent for path in sorted(ARTEFACTS.glob(f"*/{MODEL}")))
    return made_for(served.digest)


def _index(place: Place) -> Index:
    from fortpoint.features.understanding.index import Index

    return Index.load(place.folder)


def _by_words(index: Index, words: str, top: int) -> list[Hit]:
    from fortpoint.features.understanding.search import Search

    return Search(index).words(words, top)


def _by_text(place: Place, index: Index, text: str | None, top: int) -> list[Hit]:
    """Raises ``InvalidRequest`` for a text of less than two tokens, or of too many."""
    from fortpoint.cli.features_engine import opened
    from fortpoint.features.sae import Dictionary
    from fortpoint.features.understanding.search import rank_by_activity

    with opened(index.header.model or None) as engine:
        dictionary = Dictionary.load(place.folder, engine.stream.d_model, engine.stream.n_layers)
        tokens = list(engine.tokenizer.text(text or "").tokens)
        if len(tokens) < 2:
            raise InvalidRequest("an example has at least two tokens: the first is a sink")
        x = engine.stream.read([tokens], (dictionary.layer,))[dictionary.layer]
    return rank_by_activity(dictionary.encode(x[1:]), index, top)


def _described_by(place: Place) -> dict[str, Any]:
    """How good the labels are, where there are any."""
    try:
        header = _index(place).header
    except NotFound:
        return {}
    except FortPointError as error:
        return {"reason": error.message}
    if header.mean_score is None:
        return {"labels": "not judged"}
    return {"labels": f"{header.mean_score:.2f} on unseen text"}


def _figures(header: Any) -> dict[str, Any]:
    names = ("n_features", "n_dead", "n_judged", "mean_score", "mean_score_random", "n_tokens")
    return {name: getattr(header, name) for name in names}


def _print_rows(
    rows: list[dict[str, Any]], columns: tuple[str, ...], otherwise: str, as_json: bool
) -> None:
    if as_json:
        typer.echo(msgspec.json.encode(rows).decode())
        return
    if not rows:
        typer.echo(otherwise)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fortpoint.features.understanding.writing import visible

    shown = [name for name in columns if any(name in row for row in rows)]
    table = Table(*shown)
    for row in rows:
        table.add_row(*(Text(visible(str(row.get(name, "")))) for name in shown))
    Console().print(table)


def _say(found: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(msgspec.json.encode(found).decode() if as_json else text)
