"""A dictionary and a harvest whose features are known: each is planted by a rule on the text.

francisco     the token " Francisco"
month         any of twelve months
after the     the token after " the"
cooking       most tokens of a document about cooking
digit         any digit
noise         one token in fifty, at random
dead          never
san           the token " Francisco" again, weaker: a feature that keeps company
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fortpoint.features.activations import ActivationStore, Plan, begin, write_shard
from fortpoint.features.sae import Dictionary
from fortpoint.features.understanding.describe import Model, Settings
from fortpoint.features.understanding.naming import Settings as Naming
from fortpoint.features.understanding.survey import Settings as Reading

FEATURES = ("francisco", "month", "after the", "cooking", "digit", "noise", "dead", "san")
FRANCISCO, MONTH, AFTER_THE, COOKING, DIGIT, NOISE, DEAD, SAN = range(8)
D_MODEL, LAYER, CONTEXT, N_SHARDS = 32, 3, 64, 6

MONTHS = "January February March April May June July August September October November December"
PLAIN = "the a of and to in was he she it with for on at from by an that this had not are but"
MORE = "river house stone garden letter window market bridge captain winter music paper night"
KITCHEN = "sugar butter flour oven dough garlic onion simmer whisk recipe salt pepper"
TEXTS = (
    "<|end|>",
    *(" " + word for word in (*MONTHS.split(), *PLAIN.split(), *MORE.split(), *KITCHEN.split())),
    *"0123456789",
    " San",
    " Francisco",
    " Bay",
    "ing",
    ".",
    ",",
    "\n",
)
ID = {text: number for number, text in enumerate(TEXTS)}


@dataclass(frozen=True, eq=False)
class Planted:
    store: ActivationStore
    dictionary: Dictionary
    model: Model


def plant(folder: Path, seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((D_MODEL, D_MODEL)))[0].astype(np.float32)
    decoder = basis[: len(FEATURES)].copy()
    decoder[SAN] = 0.8 * decoder[FRANCISCO] + 0.6 * basis[20]
    encoder = decoder.copy()
    encoder[SAN] = basis[20] / np.float32(0.6)
    encoder[FRANCISCO] = basis[0] - np.float32(0.8 / 0.6) * basis[20]
    plan = Plan(
        model="planted", digest="sha256:0", d_model=D_MODEL, layers=(LAYER,), context=CONTEXT,
        seed=seed, n_tokens=N_SHARDS * 64 * CONTEXT, shard_tokens=64 * CONTEXT, corpus="0",
    )  # fmt: skip
    begin(folder, plan)
    document = 0
    for number in range(N_SHARDS):
        texts = [_text(rng, cooking=(document + i) % 4 == 0) for i in range(64)]
        tokens = np.concatenate(texts)
        acts = np.concatenate(
            [_activations(text, (document + i) % 4 == 0, rng) for i, text in enumerate(texts)]
        )
        x = acts @ decoder + 0.02 * rng.standard_normal((len(tokens), D_MODEL))
        x += 3.0 * basis[30]  # what all tokens share: norms are alike, so that none is a sink
        places = {
            "tokens": tokens,
            "document": np.repeat(np.arange(document, document + 64), CONTEXT),
            "position": np.tile(np.arange(CONTEXT), 64),
            "role": np.ones(len(tokens)),
        }
        write_shard(folder, number, places, {LAYER: x.astype(np.float32)})
        document += 64
    dictionary = Dictionary(
        name="planted", layer=LAYER, encoder=encoder.astype(np.float32),
        bias=np.zeros(len(FEATURES), np.float32),
        threshold=np.full(len(FEATURES), 0.5, np.float32), decoder=decoder,
        center=3.0 * basis[30], training_max=np.full(len(FEATURES), 4.0, np.float32), k=None,
    )  # fmt: skip
    readout = 0.01 * rng.standard_normal((len(TEXTS), D_MODEL)).astype(np.float32)
    readout[ID[" Bay"]] = 4 * basis[FRANCISCO]
    readout[ID[" sugar"]] = 4 * basis[COOKING]
    readout[ID["."]] = -4 * basis[COOKING]
    for group, axis in ((MONTHS, 21), (KITCHEN, 22), ("0 1 2 3 4 5 6 7 8 9", 23)):
        for word in group.split():
            readout[ID[word if word.isdigit() else " " + word]] += basis[axis]
    return Planted(
        ActivationStore(folder), dictionary, Model("planted", "sha256:0", TEXTS, readout)
    )


def settings(**more: object) -> Settings:
    """Two shards are held out."""
    return Settings(survey=Reading(n_held_out=2), naming=Naming(), **more)  # type: ignore[arg-type]


def _text(rng: np.random.Generator, cooking: bool) -> np.ndarray:
    tokens = [ID["<|end|>"]]
    while len(tokens) < CONTEXT:
        pick = rng.random()
        if pick < 0.03:
            tokens += [ID[" San"], ID[" Francisco"]]
        elif pick < 0.06:
            tokens.append(ID[" " + str(rng.choice(MONTHS.split()))])
        elif pick < 0.1:
            tokens.append(ID[str(rng.integers(10))])
        elif pick < 0.2:
            tokens.append(ID[str(rng.choice([".", ",", "\n", "ing", " Bay"]))])
        elif pick < 0.45:
            words = KITCHEN if cooking else MORE
            tokens.append(ID[" " + str(rng.choice(words.split()))])
        else:
            tokens.append(ID[" " + str(rng.choice(PLAIN.split()))])
    return np.array(tokens[:CONTEXT])


def _activations(tokens: np.ndarray, cooking: bool, rng: np.random.Generator) -> np.ndarray:
    acts = np.zeros((len(tokens), len(FEATURES)), np.float32)
    strength = rng.uniform(1.0, 4.0, len(tokens)).astype(np.float32)
    before = np.append(-1, tokens[:-1])
    months = [ID[" " + word] for word in MONTHS.split()]
    digits = [ID[digit] for digit in "0123456789"]
    there = {
        FRANCISCO: tokens == ID[" Francisco"],
        MONTH: np.isin(tokens, months),
        AFTER_THE: before == ID[" the"],
        COOKING: cooking & (rng.random(len(tokens)) < 0.8),
        DIGIT: np.isin(tokens, digits),
        NOISE: rng.random(len(tokens)) < 0.02,
        SAN: tokens == ID[" Francisco"],
    }
    for feature, where in there.items():
        acts[where, feature] = strength[where] if feature != SAN else 1.0
    return acts
