"""The dictionary that ships belongs to the embedded model, and is as good as its card says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fortpoint.engine import precision
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.llama import Llama
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.features import shipped
from fortpoint.features.sae import WEIGHTS, Dictionary
from fortpoint.features.training.measure import Coder
from fortpoint.features.understanding.index import Index, digest_of
from fortpoint.features.understanding.search import Search
from fortpoint.vault.model_folder import open_model
from served import MODEL

FOLDER = shipped.ARTEFACTS / "smollm2-135m-l9"
PACKAGE = Path(shipped.__file__).parent.parent
TEXTS = (
    "The lighthouse keeper climbed the narrow stairs every evening, lit the lamp, and wrote down "
    "the names of the ships that passed. In winter the sea threw stones at the windows.",
    "import json\n\ndef read(path):\n    with open(path) as file:\n        return json.load(file)",
    "Copper is a chemical element with the symbol Cu and atomic number 29. It is a soft, malleable "
    "metal with very high thermal and electrical conductivity.",
    "How do I ask my landlord to mend the heating? Write to them, keep a copy, and give a date by "
    "which you expect an answer. If nothing happens, ask the tenants' association for advice.",
)


def test_artefacts_keep_to_their_size() -> None:
    kinds = ("*.safetensors", "*.gz")
    n_bytes = sum(file.stat().st_size for kind in kinds for file in PACKAGE.rglob(kind))
    assert n_bytes <= 15_000_000


def test_shipped_index_was_made_for_the_shipped_weights() -> None:
    index = Index.load(FOLDER)
    assert index.header.digest == digest_of(FOLDER / WEIGHTS)
    assert len(index.features) == 4608
    assert sum(bool(feature.label) for feature in index.features) > 4500


def test_card_says_what_the_index_says() -> None:
    card, header = (FOLDER / "CARD.md").read_text(), Index.load(FOLDER).header
    assert header.mean_score is not None
    assert f"| {header.mean_score:.3f} |" in card
    assert float(re.search(r"\| loss rises by \| ([\d.]+) \|", card)[1]) <= 0.08  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "pattern"), [("months of the year", "January|March|June|July"), ("river", "[Rr]iver")]
)
def test_search_finds_a_named_thing_among_the_shipped_features(words: str, pattern: str) -> None:
    index = Index.load(FOLDER)
    for hit in Search(index).words(words, 5):
        feature = index.features[hit.feature]
        shown = " ".join("".join(context.tokens) for context in feature.contexts)
        if re.search(pattern, feature.label + shown):
            return
    pytest.fail("none of the first five has it in its label or contexts")


@pytest.mark.model
def test_shipped_dictionary_explains_texts_it_never_saw() -> None:
    folder = open_model(MODEL)
    assert FOLDER in shipped.made_for(folder.manifest.digest)
    model = Llama.load(MODEL, precision.choose("auto"), 512, 32 << 20, threads=2)
    stream, tokenizer = ResidualStream(model), ChatTokenizer.load(MODEL)
    dictionary = Dictionary.load(FOLDER, stream.d_model, stream.n_layers)
    texts = [tokenizer.encode_text(text) for text in TEXTS]
    x = stream.read(texts, (dictionary.layer,))[dictionary.layer]
    first = np.cumsum([0, *(len(text) for text in texts[:-1])])
    rows = np.delete(x, first, axis=0)
    coder = Coder(dictionary)
    acts = coder.acts(rows)
    errors = np.square(coder.decode(acts) - rows).sum()
    explained = 1 - errors / np.square(rows - rows.mean(axis=0)).sum()
    model.close()
    assert explained > 0.85
    assert 20 < float((acts.numpy() > 0).sum(axis=1).mean()) < 50
