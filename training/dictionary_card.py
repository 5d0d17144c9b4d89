"""The card of the shipped dictionary: what it is, of what it was made, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fortpoint.features.activations import ActivationStore
from fortpoint.features.training.recipe import Recipe
from fortpoint.features.understanding.index import Index

CARD = "CARD.md"


def write(
    folder: Path, recipe: Recipe, store: ActivationStore, quality: Mapping[str, float | int]
) -> None:
    """``CARD.md`` in the dictionary's own folder."""
    index = Index.load(folder)
    header, training = index.header, recipe.training
    n_tokens = sum(len(shard) for shard in store.split(recipe.n_held_out)[0])
    judged = "not judged" if header.mean_score is None else f"{header.mean_score:.3f}"
    lines = [
        f"# {recipe.name}",
        "",
        f"Features of `{recipe.model}` after block {recipe.layer}: {training.d_sae:,} directions,",
        f"of which about {training.k} are active at a token. SAELens format; matrices in bfloat16.",
        "",
        f"- model digest `{store.plan.digest}`",
        f"- trained with `training/dictionary.toml`: {training.architecture}, "
        f"{n_tokens:,} different tokens, {training.epochs:g} times, "
        f"learning rate {training.rate:.1e}, exported as JumpReLU",
        "- text: an encyclopaedia, a factbook, glosses, reviews, speeches, dialogue, jokes and "
        "Python source; dialogues (HH-RLHF, MIT); single requests, of near-duplicates one, only "
        "rows that may shape what ships",
        "- left out of training and of every figure: attention sinks (the first token of a text, "
        "and norms over ten times the median)",
        "",
        "## How good, on text that it never saw",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {name} | {_shown(value)} |" for name, value in quality.items()),
        f"| labels: balanced accuracy on unseen text, {header.n_judged:,} features | {judged} |",
        "",
        "Loss is in nats a token, with the reconstruction in the layer's place. CE recovered is "
        "told against zeros and against the layer's mean, the harder one.",
        "",
        "## Limits",
        "",
        "The held-out text is of the same sources as the training text; expect less on others. "
        "Labels are made from contrasts by a program, and say what a feature's contexts share, not "
        "what it means to the model. Features of a model this small are mostly words, word parts "
        "and places in a sentence; topics are fewer, and safety-relevant concepts fewer still: "
        "make a concept from examples for those. A dictionary explains part of the stream, never "
        "all of it: what it does not show may still be there.",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines))


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
