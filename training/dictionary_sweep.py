"""Trains small dictionaries over layers, widths and amounts of text, to choose one and a law.

    python -m training.dictionary_sweep --harvest activations --out sweep.jsonl \
        --layers 9 15 21 --widths 2304 4608 --epochs 2 [--model smollm2-135m]

A line of the output is one dictionary on text that it never saw. What is there already is not
trained again. ``--tokens`` learns from so many shards' worth only; with ``--model`` the rise of
the next token's loss is measured too.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fortpoint.cli.features_engine import opened
from fortpoint.features.activations import ActivationStore, Shard
from fortpoint.features.training.batches import Batches, measure_scaling, sample
from fortpoint.features.training.export import calibrate, dictionary_of
from fortpoint.features.training.measure import measure_rise, pass_over
from fortpoint.features.training.settings import Settings
from fortpoint.features.training.trainer import Trainer


class Case(msgspec.Struct, frozen=True):
    """One dictionary to try; ``n_shards`` are learned from."""

    layer: int
    n_shards: int
    settings: Settings


class Tried(msgspec.Struct, frozen=True):
    """What came of a case; ``tokens`` are those seen, ``text`` the different ones among them."""

    case: Case
    tokens: int
    text: int
    fvu: float
    l0: float
    dead_share: float
    seconds: float
    rise: float | None = None


def main() -> None:
    arguments = _arguments()
    store = ActivationStore(arguments.harvest)
    learn, held_out = store.split(arguments.held_out)
    done = {one.case for one in read(arguments.out)}
    for case in _cases(arguments, len(learn)):
        if case in done:
            continue
        tried = attempt(case, store, learn[: case.n_shards], held_out, arguments.model)
        with arguments.out.open("ab") as out:
            out.write(msgspec.json.encode(tried) + b"\n")
        print(_line(tried), flush=True)


def attempt(
    case: Case,
    store: ActivationStore,
    learn: Sequence[Shard],
    held_out: Sequence[Shard],
    model: str | None,
) -> Tried:
    started = time.monotonic()
    scaling = measure_scaling(store, case.layer, learn)
    batches = Batches(store, case.layer, learn, case.settings.batch, scaling, case.settings.seed)
    n_steps = round(case.settings.epochs * batches.per_epoch)
    trainer = Trainer(case.settings, store.plan.d_model, n_steps)
    trainer.begin(batches.sample())
    for x in itertools.islice(batches.since(0), n_steps):
        trainer.step(x)
    trainer.close()
    seconds = time.monotonic() - started
    dictionary = dictionary_of(trainer, scaling, "tried", case.layer)
    if case.settings.architecture in {"batchtopk", "matryoshka"}:
        dictionary = calibrate(dictionary, sample(store, case.layer, learn), case.settings.k)
    passed = pass_over(dictionary, store, held_out)
    rise = None
    if model is not None:
        with opened(model) as engine:
            rise = measure_rise(dictionary, store, held_out, engine.stream)
    return Tried(
        case=case,
        tokens=n_steps * case.settings.batch,
        text=batches.n_tokens,
        fvu=1 - passed.explained,
        l0=passed.l0,
        dead_share=passed.dead_share,
        seconds=round(seconds, 1),
        rise=rise,
    )


def read(path: Path) -> list[Tried]:
    if not path.exists():
        return []
    return [msgspec.json.decode(line, type=Tried) for line in path.read_bytes().splitlines()]


def _cases(arguments: argparse.Namespace, n_learn: int) -> list[Case]:
    return [
        Case(
            layer,
            min(n_shards or n_learn, n_learn),
            Settings(
                architecture=architecture,
                d_sae=width,
                k=k,
                epochs=epochs,
                learning_rate=rate,
                warmup_steps=arguments.warmup,
                batch=arguments.batch,
                prefixes=(width // 16, width // 4) if architecture == "matryoshka" else (),
            ),
        )
        for layer, n_shards, architecture, width, k, epochs, rate in itertools.product(
            arguments.layers,
            arguments.shards,
            arguments.architectures,
            arguments.widths,
            arguments.k,
            arguments.epochs,
            arguments.rates,
        )
    ]


def _line(tried: Tried) -> str:
    case, settings = tried.case, tried.case.settings
    rise = "" if tried.rise is None else f"  loss +{tried.rise:.3f}"
    return (
        f"layer {case.layer:2}  {settings.architecture} {settings.d_sae} k {settings.k}  "
        f"{tried.text / 1e6:.1f} M x {settings.epochs:g}  rate {settings.rate:.1e}  "
        f"EV {1 - tried.fvu:.4f}  L0 {tried.l0:.1f}  dead {tried.dead_share:.3f}{rise}  "
        f"{tried.seconds:.0f} s, {tried.tokens / tried.seconds:,.0f} tokens/s"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--harvest", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[4608])
    parser.add_argument("--shards", type=int, nargs="+", default=[0], help="0 takes all")
    parser.add_argument("--k", type=int, nargs="+", default=[40])
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0])
    parser.add_argument("--architectures", nargs="+", default=["batchtopk"])
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=1)
    parser.add_argument("--model", help="measure losses with this model of the home")
    return parser.parse_args()


if __name__ == "__main__":
    main()
