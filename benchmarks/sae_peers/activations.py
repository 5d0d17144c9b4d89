"""The same activations for everybody: tokens in random order, centred, of mean square 1.

    files = prepare(folder, source, n_train=614_400, n_held_out=40_960)
    files.train, files.held_out   # float32 [n, d_model], read by every contestant

They come from a harvest of the product, one that exists or one made here with the embedded
model from ``--text``, else from the files of this repository.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fortpoint.config import Engine
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.loading import load_model
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.features import corpus, harvest
from fortpoint.features.activations import ActivationStore, widen
from fortpoint.vault.model_folder import open_model

LAYER = 15
_SHARED = "text.jsonl.gz"
_SUFFIXES = {".md", ".py", ".toml", ".txt"}
_PART = 4000  # characters of a text made of a file


@dataclass(frozen=True)
class Files:
    """``n_tokens`` were harvested; ``source`` says of what."""

    train: Path
    held_out: Path
    source: str
    n_tokens: int


def prepare(
    folder: Path,
    model: Path,
    n_train: int,
    n_held_out: int,
    text: Path | None = None,
    harvested: Path | None = None,
    layer: int | None = None,
) -> Files:
    """Write both files into ``folder``, out of the harvest, which is made if need be.

    ``layer`` None is the harvest's first, and ``LAYER`` where one is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if harvested is None:
        layer = LAYER if layer is None else layer
        text = text or _default_text(folder)
        # Some tokens are sinks; a few more than wanted make up for them.
        store = _harvest(folder / "harvest", model, text, int((n_train + n_held_out) * 1.03), layer)
        source = f"{text.name}, layer {layer} of {model.name}"
    else:
        store = ActivationStore(harvested)
        layer = store.plan.layers[0] if layer is None else layer
        store.check_layer(layer)
        source = f"{harvested.name}, layer {layer} of {store.plan.model}"
    files = Files(folder / "train.npy", folder / "held_out.npy", source, store.n_tokens)
    _write(store, layer, files, n_train, n_held_out)
    return files


def _write(store: ActivationStore, layer: int, files: Files, n_train: int, n_held_out: int) -> None:
    """Held-out rows come from the end: text that nobody trains on."""
    n_kept = sum(len(store.kept(shard, layer)) for shard in store.shards)
    if n_kept < n_train + n_held_out:
        raise SystemExit(f"the harvest has {n_kept} tokens that are no sinks; ask for fewer")
    train = _rows(store, layer, n_train, 1)
    held_out = _rows(store, layer, n_held_out, -1)
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    train -= mean
    held_out -= mean
    factor = np.float32(np.square(train[:: max(n_train // 65_536, 1)]).mean() ** -0.5)
    train *= factor
    held_out *= factor
    np.random.default_rng(0).shuffle(train, axis=0)
    np.save(files.train, train)
    np.save(files.held_out, held_out)


def _rows(store: ActivationStore, layer: int, n: int, step: int) -> np.ndarray:
    """The first ``n`` rows that are no sinks, ``[n, d_model]``; the last for ``step`` -1."""
    x = np.empty((n, store.plan.d_model), np.float32)
    at = 0
    for shard in store.shards[::step]:
        kept = store.kept(shard, layer)[::step][: n - at]
        x[at : at + len(kept)] = widen(shard.bits(layer)[kept])
        at += len(kept)
        if at == n:
            break
    return x


def _harvest(folder: Path, model: Path, text: Path, n_tokens: int, layer: int) -> ActivationStore:
    opened = open_model(model)
    tokenizer = ChatTokenizer.load(opened.path)
    documents = corpus.read([text], tokenizer, max_tokens=n_tokens)
    stream = ResidualStream(load_model(opened.path, Engine()))
    settings = harvest.Settings(layers=(layer,), n_tokens=n_tokens)
    plan, windows = harvest.prepare(
        documents, settings, stream, opened.manifest.name, opened.manifest.digest
    )

    def say(stage: str, done: int, total: int) -> None:
        print(f"{stage}  {done:,} of {total:,} tokens", file=sys.stderr, flush=True)

    return harvest.harvest(folder, plan, windows, stream, say)


def _default_text(folder: Path) -> Path:
    """The corpus beside the checkout, else this repository as text."""
    root = Path(__file__).resolve().parent.parent.parent
    shared = root.parent / "shared" / "data" / _SHARED
    return shared if shared.exists() else _own_text(root, folder / "own-text.jsonl.gz")


def _own_text(root: Path, target: Path) -> Path:
    with gzip.open(target, "wt", encoding="utf-8") as file:
        for path in sorted(root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.suffix not in _SUFFIXES or hidden:
                continue
            text = path.read_text(encoding="utf-8")
            for start in range(0, len(text), _PART):
                file.write(json.dumps({"text": text[start : start + _PART]}) + "\n")
    return target
