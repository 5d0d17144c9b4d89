"""What ``fortpoint features train`` does: harvest where a recipe says so, learn, measure, keep.

Several processes of torch's launcher train together; the first of them does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fortpoint import config as configuration
from fortpoint.cli.features_engine import Harvesting, check_digest, opened
from fortpoint.cli.progress import Progress
from fortpoint.errors import InvalidRequest
from fortpoint.home import Home

if TYPE_CHECKING:
    from fortpoint.features.activations import ActivationStore, Shard
    from fortpoint.features.sae import Dictionary
    from fortpoint.features.training.batches import Scaling
    from fortpoint.features.training.checkpoint import Run
    from fortpoint.features.training.run import Group
    from fortpoint.features.training.settings import Settings
    from fortpoint.features.training.trainer import Trainer

_MAXIMA_SHARDS = 32


@dataclass(frozen=True)
class Made:
    """A dictionary that was trained: where it and its report lie, and how good it is."""

    folder: Path
    report: Path
    quality: dict[str, float | int]


def follow(path: Path, work: Path | None) -> Made | None:
    """Harvest and train as a recipe says. None in the processes that only help."""
    from fortpoint.features.training import recipe as recipes
    from fortpoint.features.training.run import processes

    recipe = recipes.read(path)
    folder = work or _home().path / "training" / recipe.name
    texts = [path.parent / text for text in recipe.texts]
    wish = Harvesting(
        (recipe.layer,),
        recipe.harvest.tokens,
        recipe.harvest.context,
        recipe.harvest.max_gib,
        recipe.harvest.seed,
    )
    with processes() as group, Progress() as progress:
        if group.leads:
            with opened(recipe.model) as engine:
                engine.harvest(texts, wish, folder / "activations", progress.update)
        group.wait()
        return _train(
            folder / "activations",
            recipe.layer,
            recipe.name,
            recipe.training,
            recipe.n_held_out,
            folder,
            group,
            progress,
        )


def train_on(
    harvest: Path,
    layer: int | None,
    name: str,
    settings: Settings,
    n_held_out: int,
    work: Path | None,
) -> Made | None:
    """Train on a harvest that is there. None in the processes that only help."""
    from fortpoint.features.training.run import processes

    folder = work or _home().path / "training" / name
    with processes() as group, Progress() as progress:
        return _train(harvest, layer, name, settings, n_held_out, folder, group, progress)


def _train(
    harvest: Path,
    layer: int | None,
    name: str,
    settings: Settings,
    n_held_out: int,
    folder: Path,
    group: Group,
    progress: Progress,
) -> Made | None:
    from fortpoint.features.activations import ActivationStore
    from fortpoint.features.library import check_name
    from fortpoint.features.training.run import plan_run, train

    check_name(name)
    store = ActivationStore(harvest)
    if layer is None:
        if len(store.plan.layers) > 1:
            raise InvalidRequest(f"name one of the layers {store.plan.layers} with --layer")
        layer = store.plan.layers[0]
    run = plan_run(store, layer, settings, n_held_out, group.size)
    trainer, scaling = train(folder, run, store, progress.update, group)
    trainer.close()
    if not group.leads:
        return None
    shards, held_out = store.split(n_held_out)
    dictionary = _finished(trainer, scaling, name, layer, store, shards, progress)
    return _measured(dictionary, run, folder, store, held_out, progress)


def _finished(
    trainer: Trainer,
    scaling: Scaling,
    name: str,
    layer: int,
    store: ActivationStore,
    shards: Sequence[Shard],
    progress: Progress,
) -> Dictionary:
    """Its threshold set and its units known."""
    import numpy as np

    from fortpoint.features.training.batches import sample
    from fortpoint.features.training.export import calibrate, dictionary_of
    from fortpoint.features.training.measure import pass_over

    dictionary = dictionary_of(trainer, scaling, name, layer)
    if trainer.settings.architecture in {"batchtopk", "matryoshka"}:
        dictionary = calibrate(dictionary, sample(store, layer, shards), trainer.settings.k)
    passed = pass_over(dictionary, store, shards[-_MAXIMA_SHARDS:], progress.update)
    maxima = np.where(passed.maximum > 0, passed.maximum, np.float32(1))
    return dataclasses.replace(dictionary, training_max=maxima.astype(np.float32))


def _measured(
    dictionary: Dictionary,
    run: Run,
    folder: Path,
    store: ActivationStore,
    held_out: Sequence[Shard],
    progress: Progress,
) -> Made:
    from fortpoint.features.exchange import saelens
    from fortpoint.features.training import report
    from fortpoint.features.training.checkpoint import read_metrics
    from fortpoint.features.training.measure import measure_losses, pass_over

    target = _home().features / dictionary.name
    saelens.write(dictionary, target, model_name=run.harvest.model)
    passed = pass_over(dictionary, store, held_out, progress.update)
    with opened(run.harvest.model) as engine:
        check_digest(engine.model, run.harvest.digest)
        losses = measure_losses(
            dictionary, store, held_out, engine.stream, progress=progress.update
        )
    quality = report.quality_of(passed, losses)
    page = folder / "report.html"
    report.write(page, dictionary.name, run, list(read_metrics(folder)), passed, quality)
    return Made(target, page, quality)


def _home() -> Home:
    home = Home(configuration.load().home_path)
    home.make()
    return home
