"""What is known of a dictionary's features as the JSONL that Neuronpedia imports.

    source = Source("smollm2-135m", "res-fortpoint", n_layers=30)
    write(Path("out/15-res-fortpoint"), dictionary, Index.load(folder), source)

    15-res-fortpoint/
        model.jsonl  release.jsonl  sourceset.jsonl  source.jsonl      a row each
        config/explanation_type.jsonl  config/explanation_model_type.jsonl
        features/batch-0.jsonl.gz      1,024 features a file
        activations/batch-0.jsonl.gz   their texts
        explanations/batch-0.jsonl.gz  their labels

The rows' names and meaning are in ``neuronpedia_records.py``. Activations are as exact as the
index has them, in hundredths of each feature's maximum. The same index gives the same bytes.

Not protected here: the texts. Contexts are pieces of what was harvested.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.features.exchange import neuronpedia_records as rows
from fortpoint.features.exchange.whole_folder import whole_folder
from fortpoint.features.sae import Dictionary
from fortpoint.features.understanding.index import Context, Feature, Index

BATCH = 1024
BY_CONTRAST = "fortpoint_contrast"
BY_MODEL = "fortpoint_labelling-model"
NO_MODEL = "fortpoint"

_COMPRESSION = 5
_DECIMALS = 5
_ID_DIGITS = 24
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """Where the features belong there. ``model`` is Neuronpedia's name of it; ``set_name`` has
    no layer in it; ``moment`` is the time that rows say they were made, in UTC."""

    model: str
    set_name: str
    n_layers: int
    description: str = "Residual stream"
    dataset: str = ""
    creator: str = "Fort Point"
    creator_id: str = rows.DEFAULT_CREATOR
    visibility: str = "UNLISTED"
    moment: str = "2026-01-01T00:00:00.000"


@dataclass(frozen=True)
class Written:
    """How many rows."""

    n_features: int
    n_activations: int
    n_explanations: int


def write(
    folder: Path,
    dictionary: Dictionary,
    index: Index,
    source: Source,
    progress: Progress | None = None,
) -> Written:
    """Make ``folder``, whole or not at all.

    Raises ``InvalidRequest`` when it is there already, ``ModelError`` for an index of another
    dictionary or figures that are not finite, ``StorageError`` when it cannot be written.
    """
    if len(index.features) != dictionary.n_features:
        raise ModelError(
            f"the index describes {len(index.features)} features, {dictionary.name} has "
            f"{dictionary.n_features}; describe it again"
        )
    maker = _Maker(source, dictionary)
    counts: dict[str, int] = {}
    with whole_folder(folder) as partial:
        maker.write_about(partial)
        for number, start in enumerate(range(0, len(index.features), BATCH)):
            batch = index.features[start : start + BATCH]
            for name, found in maker.batch(batch).items():
                _write_batch(partial / name, number, found)
                counts[name] = counts.get(name, 0) + len(found)
            if progress is not None:
                progress("export", start + len(batch), len(index.features))
        labellers = sorted({feature.labeller for feature in index.features})
        maker.write_config(partial / "config", [name or NO_MODEL for name in labellers])
    return Written(*(counts.get(name, 0) for name in ("features", "activations", "explanations")))


class _Maker:
    """Rows of one source."""

    def __init__(self, source: Source, dictionary: Dictionary) -> None:
        self._source, self._dictionary = source, dictionary
        self._layer = f"{dictionary.layer}-{source.set_name}"
        self._shared: dict[str, Any] = {
            "creatorId": source.creator_id,
            "visibility": source.visibility,
            "createdAt": source.moment,
        }

    def batch(self, features: Sequence[Feature]) -> dict[str, list[msgspec.Struct]]:
        """By the folder that they go to."""
        explained = (self._explanation(feature) for feature in features if feature.label)
        return {
            "features": [self._feature(feature) for feature in features],
            "activations": [row for feature in features for row in self._activations(feature)],
            "explanations": list(explained),
        }

    def _feature(self, feature: Feature) -> rows.FeatureRow:
        edges = _edges(feature)
        return rows.FeatureRow(
            modelId=self._source.model,
            layer=self._layer,
            index=str(feature.index),
            sourceSetName=self._source.set_name,
            creatorId=self._source.creator_id,
            createdAt=self._source.moment,
            maxActApprox=_number(feature.max_activation),
            frac_nonzero=_number(feature.frequency, 8),
            pos_str=tuple(_text(effect.token) for effect in feature.promoted),
            pos_values=_numbers([effect.logit for effect in feature.promoted]),
            neg_str=tuple(_text(effect.token) for effect in feature.suppressed),
            neg_values=_numbers([effect.logit for effect in feature.suppressed]),
            freq_hist_data_bar_heights=_numbers(feature.histogram),
            freq_hist_data_bar_values=_numbers(((edges[1:] + edges[:-1]) / 2).tolist()),
            topkCosSimIndices=tuple(kin.index for kin in feature.neighbours),
            topkCosSimValues=_numbers([kin.closeness / 100 for kin in feature.neighbours]),
            hasVector=True,
            vector=_numbers(self._dictionary.decoder[feature.index].tolist(), 7),
            vectorDefaultSteerStrength=_number(feature.max_activation),
            hookName=f"blocks.{self._dictionary.layer}.hook_resid_post",
        )

    def _activations(self, feature: Feature) -> Iterator[rows.ActivationRow]:
        for number, context in enumerate(feature.contexts):
            values = _numbers([s * feature.max_activation / 100 for s in context.strengths])
            strongest = max(values)
            low, high, share = _interval(feature, context, values[context.peak])
            yield rows.ActivationRow(
                id=self._id("activation", feature.index, number),
                modelId=self._source.model,
                layer=self._layer,
                index=str(feature.index),
                creatorId=self._source.creator_id,
                createdAt=self._source.moment,
                tokens=tuple(map(_text, context.tokens)),
                values=values,
                maxValue=strongest,
                maxValueTokenIndex=values.index(strongest),
                minValue=min(values),
                binMin=_number(low),
                binMax=_number(high),
                binContains=_number(share),
                qualifyingTokenIndex=context.peak,
            )

    def _explanation(self, feature: Feature) -> rows.ExplanationRow:
        score = {"balanced_accuracy": feature.label_score}
        judged = feature.label_score is not None
        return rows.ExplanationRow(
            id=self._id("explanation", feature.index, 0),
            modelId=self._source.model,
            layer=self._layer,
            index=str(feature.index),
            authorId=self._source.creator_id,
            description=_text(feature.label),
            typeName=BY_MODEL if feature.labeller else BY_CONTRAST,
            explanationModelName=feature.labeller or NO_MODEL,
            notes=msgspec.json.encode(score).decode() if judged else None,
            umap_x=float(feature.x),
            umap_y=float(feature.y),
            umap_cluster=feature.cluster,
            createdAt=self._source.moment,
        )

    def _id(self, kind: str, index: int, number: int) -> str:
        """In the form of a cuid, and the same each time."""
        what = f"{self._source.model}/{self._layer}/{kind}/{index}/{number}".encode()
        value = int.from_bytes(hashlib.sha256(what).digest()[:16], "big")
        digits = ""
        for _ in range(_ID_DIGITS):
            value, digit = divmod(value, 36)
            digits += _BASE36[digit]
        return f"c{digits}"

    def write_about(self, folder: Path) -> None:
        source, dictionary = self._source, self._dictionary
        release = f"{source.model}-{source.set_name}"
        model = rows.ModelRow(
            id=source.model,
            displayName=source.model,
            displayNameShort=source.model,
            owner=source.creator,
            layers=source.n_layers,
            neuronsPerLayer=0,
            dimension=dictionary.encoder.shape[1],
            updatedAt=source.moment,
            **self._shared,
        )
        made = rows.ReleaseRow(
            name=release,
            description=source.description,
            descriptionShort=source.description,
            creatorName=source.creator,
            creatorNameShort=source.creator,
            **self._shared,
        )
        source_set = rows.SourceSetRow(
            modelId=source.model,
            name=source.set_name,
            description=source.description,
            creatorName=source.creator,
            releaseName=release,
            **self._shared,
        )
        place = rows.SourceRow(
            id=self._layer,
            modelId=source.model,
            setName=source.set_name,
            dataset=source.dataset,
            **self._shared,
        )
        files = {"model": model, "release": made, "sourceset": source_set, "source": place}
        for name, row in files.items():
            (folder / f"{name}.jsonl").write_bytes(_lines([row]))

    def write_config(self, folder: Path, labellers: Sequence[str]) -> None:
        """What explanations refer to. Neuronpedia reads it from a ``config`` folder of its own."""
        shown = {
            BY_CONTRAST: "Terms that set a feature's texts apart, and the tokens it promotes.",
            BY_MODEL: "What a language model wrote when it was shown a feature's texts.",
        }
        types = [
            rows.ExplanationTypeRow(
                name=name,
                displayName=name,
                description=description,
                creatorName=self._source.creator,
                creatorId=self._source.creator_id,
            )
            for name, description in shown.items()
        ]
        writers = [
            rows.ExplanationModelRow(
                name=name, displayName=name, description="", creatorName=self._source.creator
            )
            for name in labellers
        ]
        folder.mkdir()
        (folder / "explanation_type.jsonl").write_bytes(_lines(types))
        (folder / "explanation_model_type.jsonl").write_bytes(_lines(writers))


def _edges(feature: Feature) -> NDArray[np.float64]:
    """Of its histogram's bars: one more than there are bars."""
    return np.linspace(0, feature.max_activation, len(feature.histogram) + 1)


def _interval(feature: Feature, context: Context, value: float) -> tuple[float, float, float]:
    """From where to where, and which share of activations lies there: a lesser context's bar."""
    total = sum(feature.histogram)
    if context.level == 0 or not total:
        return -1.0, feature.max_activation, -1.0
    edges = _edges(feature)
    bar = min(int(np.searchsorted(edges, value, side="right")) - 1, len(feature.histogram) - 1)
    return float(edges[bar]), float(edges[bar + 1]), feature.histogram[bar] / total


def _write_batch(folder: Path, number: int, found: Sequence[msgspec.Struct]) -> None:
    """Nothing where there is nothing: an empty file cannot be imported."""
    if not found:
        return
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        raw = stack.enter_context((folder / f"batch-{number}.jsonl.gz").open("wb"))
        file = stack.enter_context(gzip.GzipFile("", "wb", _COMPRESSION, raw, mtime=0))
        file.write(_lines(found))


def _lines(found: Sequence[msgspec.Struct]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in found)


def _text(text: str) -> str:
    return text.replace("\0", " ")  # which PostgreSQL does not store


def _numbers(values: Sequence[float], decimals: int = _DECIMALS) -> tuple[float, ...]:
    return tuple(_number(value, decimals) for value in values)


def _number(value: float, decimals: int = _DECIMALS) -> float:
    if not math.isfinite(value):
        raise ModelError("a figure of a feature is not finite; describe the dictionary again")
    return round(float(value), decimals)
