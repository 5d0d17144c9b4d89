"""Makes the dictionary that ships with the embedded model: one command, from data to card.

    python -m training.dictionary --data ../shared/data --work ~/.cache/fortpoint-dictionary

Text is gathered, the model's residual stream harvested, the dictionary trained and measured as
``dictionary.toml`` says, its features described, and everything put among the artefacts. Each
step goes on where it was stopped. ``--no-ship`` ends before the artefacts are replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import msgspec
import numpy as np

from fortpoint import config as configuration
from fortpoint.cli import features_training, features_understand
from fortpoint.features import shipped
from fortpoint.features.activations import ActivationStore
from fortpoint.features.exchange import saelens
from fortpoint.features.sae import Dictionary
from fortpoint.features.training import recipe as recipes
from fortpoint.features.training.recipe import Recipe
from fortpoint.home import Home
from training import dictionary_card, dictionary_corpus

RECIPE = Path(__file__).with_name("dictionary.toml")
_DESCRIBED_TOKENS = 2_500_000


def main() -> None:
    arguments = _arguments()
    work = arguments.work.expanduser()
    work.mkdir(parents=True, exist_ok=True)
    recipe = recipes.read(RECIPE)
    corpus = work / recipe.texts[0]
    if not corpus.exists():
        dictionary_corpus.write(arguments.data, corpus)
    shutil.copy(RECIPE, work / RECIPE.name)
    made = features_training.follow(work / RECIPE.name, work)
    if made is None or arguments.no_ship:
        return
    ship(recipe, work, made.quality)


def ship(recipe: Recipe, work: Path, quality: dict[str, float | int]) -> None:
    """Put the trained dictionary, what is known of it and its card where the package has them."""
    store = ActivationStore(work / "activations")
    home = Home(configuration.load().home_path)
    trained = Dictionary.load(home.features / recipe.name, store.plan.d_model, recipe.layer + 1)
    target = shipped.ARTEFACTS / recipe.name
    target.parent.mkdir(exist_ok=True)
    saelens.write(rounded(trained), target, recipe.model, precision="bfloat16")
    made_for = shipped.MadeFor(store.plan.model, store.plan.digest)
    (target / shipped.MODEL).write_bytes(msgspec.json.encode(made_for) + b"\n")
    features_understand.describe(
        str(target),
        work / "activations",
        held_out=recipe.n_held_out,
        tokens=_DESCRIBED_TOKENS,
        compact=True,
        clusters=0,
        out=None,
        as_json=False,
    )
    (target / "map.html").unlink(missing_ok=True)  # made anew by `features cluster`
    dictionary_card.write(target, recipe, store, quality)


def rounded(dictionary: Dictionary) -> Dictionary:
    """As it is read again from bfloat16: what ships is what is described."""
    from fortpoint.features.activations import narrow, widen

    return dataclasses.replace(
        dictionary,
        encoder=np.ascontiguousarray(widen(narrow(dictionary.encoder))),
        decoder=np.ascontiguousarray(widen(narrow(dictionary.decoder))),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of texts and prompts")
    parser.add_argument("--work", type=Path, required=True, help="where it goes on")
    parser.add_argument("--no-ship", action="store_true", help="train and measure only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
