"""From which score on a detector acts on an answer: measured on answers of the embedded model.

    python -m training.answers --data ../shared/data --model ~/.fortpoint/models/smollm2-135m

Detectors were trained on what users write. So the model answers ordinary requests, hard benign
ones and harmful ones; each answer is replayed through ``fortpoint.guard.answer`` in steps of
eight tokens, as a stream is judged, and every detector's highest score is kept, with the probes
and by words alone. A detector applies to answers when it ranks those to harmful requests above
ordinary ones (AUROC of at least ``WORTH``). Its threshold lies above all but ``BUDGET`` of the
ordinary answers to rows that may shape what ships; what that gives on other rows is printed.

Answers do not depend on the guard and stay in the cache; readings are made anew (some 2 ms a
token), so run it again after ``training.guard``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.config import Engine
from fortpoint.engine.chat import ChatTokenizer
from fortpoint.engine.linear_probe import LinearProbes
from fortpoint.engine.loading import load_model
from fortpoint.engine.model import Model
from fortpoint.engine.offline import Offline
from fortpoint.engine.protocol import Generate, Sampling
from fortpoint.engine.residual_stream import ResidualStream
from fortpoint.features.library import Library
from fortpoint.guard.answer import Answers, AnswerThresholds, Thresholds
from fortpoint.guard.calibration import Calibrations
from fortpoint.guard.detector import CombinedDetector
from fortpoint.guard.guard import ARTEFACTS
from fortpoint.guard.text_model import TextModel
from fortpoint.guard.training.figures import Rate, auroc
from fortpoint.types import Message, Reading, Role
from training.rows import Row, select

STEP_TOKENS = 8
FIRST_TOKENS = 16
MAX_TOKENS = 160
BATCH = 48
BUDGET = 0.002
WORTH = 0.8
LEAST = 0.99
N_ROWS = {"benign": 1110, "benign_hard": 120, "harmful_request": 240}

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Answered:
    """A request, what it is, whether it may shape what ships, and the model's answer."""

    prompt: str
    label: str
    train: bool
    answer: str


def generate(data: Path, model: Model, tokenizer: ChatTokenizer, file: Path) -> list[Answered]:
    """The cached answers, after those that are missing were made."""
    answered = [Answered(**json.loads(line)) for line in _lines(file)]
    have = {label: sum(one.label == label for one in answered) for label in N_ROWS}
    if all(have[label] >= n for label, n in N_ROWS.items()):
        return answered
    known = {one.prompt for one in answered}
    rows = [row for row in select(data) if row.text not in known and len(row.text) < 1500]
    random.Random(7).shuffle(rows)  # noqa: S311 - a fixed order
    wanted = [
        row for label, n in N_ROWS.items() for row in _of(rows, label)[: max(n - have[label], 0)]
    ]
    engine = Offline(model, tokenizer, Library({}), Engine(max_batch=16))
    with file.open("a", encoding="utf-8") as cache:
        for at in range(0, len(wanted), BATCH):
            part = wanted[at : at + BATCH]
            said = engine.answer([_request(i, row.text) for i, row in enumerate(part)])
            for row, text in zip(part, said, strict=True):
                one = Answered(row.text, row.label, row.train, text or "")
                answered.append(one)
                cache.write(json.dumps(asdict(one)) + "\n")
            cache.flush()
            print(f"{at + len(part)} of {len(wanted)} answers", flush=True)
    engine.close()
    return answered


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _of(rows: Sequence[Row], label: str) -> list[Row]:
    return [row for row in rows if row.label == label]


def _request(number: int, text: str) -> Generate:
    sampling = Sampling(MAX_TOKENS, temperature=0.7, top_p=0.95, seed=number)
    messages = (Message(Role.USER, text),)
    return Generate(str(number), sampling, messages, hold=False, read=False)


def replayed(
    answers: Answers, tokens: Sequence[str], logits: Float32 | None, probes: Sequence[str]
) -> dict[str, float]:
    """Each detector's highest score over one answer, judged as a stream is."""
    judge = answers.begin(None if logits is None else probes)
    for number, text in enumerate(tokens):
        reading = None
        if logits is not None:
            reading = Reading((), 1, logits[number].tobytes(), ())
        judge.add(text, reading)
        if number + 1 >= FIRST_TOKENS and (number + 1) % STEP_TOKENS == 0:
            judge.review(final=False)
    return {score.detector: score.score for score in judge.review(final=True).scores}


def scored(
    answered: Sequence[Answered], answers: Answers, model: Model, tokenizer: ChatTokenizer
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Of each answer the scores by words alone, and with the probes.

    A token's logits are those where it was chosen: at the token before it.
    """
    probes = LinearProbes.load(ARTEFACTS / "probes", model.d_model, model.n_layers)
    stream = ResidualStream(model)
    for number, one in enumerate(answered):
        prompt = tokenizer.chat((Message(Role.USER, one.prompt),)).tokens
        ids = tokenizer.encode_text(one.answer)
        seen = stream.read([[*prompt, *ids]], probes.layers)
        rows = probes.read(seen, len(prompt) + len(ids))[len(prompt) - 1 :]
        texts = [tokenizer.decode((token,)) for token in ids]
        yield (
            replayed(answers, texts, None, probes.names),
            replayed(answers, texts, rows, probes.names),
        )
        if number % 20 == 0:
            print(f"{number} of {len(answered)} answers read", flush=True)


def chosen(
    answered: Sequence[Answered], scores: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """Detector to threshold, of those that say something about answers; prints what it gives."""
    label = np.array([one.label for one in answered])
    train = np.array([one.train for one in answered])
    harm, ordinary = label == "harmful_request", label == "benign"
    thresholds = {}
    for name, score in scores.items():
        area = auroc(score[harm], score[ordinary], np.ones(int(ordinary.sum())))
        threshold = max(float(np.quantile(score[ordinary & train], 1 - BUDGET)), LEAST)
        threshold = round(min(threshold + 1e-6, 1.0), 6)
        print(f"  {name:<16} AUROC {area:.3f}, threshold {threshold:.6f}")
        for title, mask in (
            ("ordinary, evaluation only", ordinary & ~train),
            ("hard benign", label == "benign_hard"),
            ("to harmful requests", harm),
        ):
            print(f"    {title:<26} {Rate(int((score[mask] >= threshold).sum()), int(mask.sum()))}")
        if area >= WORTH:
            thresholds[name] = threshold
    return thresholds


def main() -> None:
    options = _options()
    options.cache.mkdir(parents=True, exist_ok=True)
    folder = options.model.expanduser()
    model, tokenizer = load_model(folder, Engine(kv_cache_mib=256)), ChatTokenizer.load(folder)
    answered = generate(options.data, model, tokenizer, options.cache / "answers.jsonl")
    answered = answered[: options.most]
    calibrations = Calibrations.load(ARTEFACTS / "calibration.json").detectors
    detectors = [CombinedDetector(name, one) for name, one in calibrations.items()]
    all_of_them = AnswerThresholds({name: Thresholds(1.0, 1.0) for name in calibrations})
    text_model = TextModel.load(ARTEFACTS / "text_model.safetensors")
    answers = Answers(text_model, detectors, all_of_them, {}, {})
    both = list(scored(answered, answers, model, tokenizer))
    found = []
    for title, index in (("words alone", 0), ("words and probes", 1)):
        print(title)
        columns = {name: np.array([pair[index][name] for pair in both]) for name in calibrations}
        found.append(chosen(answered, columns))
    words, probes = found
    kept = {name: Thresholds(words[name], probes[name]) for name in words if name in probes}
    if options.most is None:
        content = msgspec.json.format(msgspec.json.encode(AnswerThresholds(kept)), indent=2)
        (ARTEFACTS / "answers.json").write_bytes(content + b"\n")
    model.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Choose the thresholds that hold for answers.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=Path("~/.fortpoint/models/smollm2-135m"))
    parser.add_argument("--cache", type=Path, default=Path(".bench/guard_output"))
    parser.add_argument("--most", type=int, help="Read so many answers only, write nothing.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
