"""The rows of Neuronpedia's JSONL exports, by the names of its database's columns.

A column that is not here has the database's default. What a row refers to must exist there:
``creatorId`` is a user, ``typeName`` and ``explanationModelName`` are rows of ``config/``.
"""

from __future__ import annotations

import msgspec

DEFAULT_CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that a Neuronpedia instance of one's own is set up with (``DEFAULT_CREATOR_ID``)."""


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    displayName: str
    displayNameShort: str
    owner: str
    creatorId: str
    layers: int
    neuronsPerLayer: int
    dimension: int
    visibility: str
    createdAt: str
    updatedAt: str


class ReleaseRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str
    descriptionShort: str
    urls: tuple[str, ...] = ()
    creatorName: str
    creatorNameShort: str
    creatorId: str
    visibility: str
    createdAt: str


class SourceSetRow(msgspec.Struct, frozen=True, kw_only=True):
    modelId: str
    name: str
    description: str
    creatorName: str
    creatorId: str
    releaseName: str
    visibility: str
    createdAt: str


class SourceRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    modelId: str
    setName: str
    dataset: str
    creatorId: str
    visibility: str
    createdAt: str


class FeatureRow(msgspec.Struct, frozen=True, kw_only=True):
    """``layer`` is the source's id, ``15-res-fortpoint``; ``index`` is text, as there.

    ``freq_hist_data_bar_values`` are the middles of the bars, as many as there are heights:
    where an edge more is given, the pages of the features do not open.
    """

    modelId: str
    layer: str
    index: str
    sourceSetName: str
    creatorId: str
    createdAt: str
    maxActApprox: float
    frac_nonzero: float
    pos_str: tuple[str, ...]
    pos_values: tuple[float, ...]
    neg_str: tuple[str, ...]
    neg_values: tuple[float, ...]
    freq_hist_data_bar_heights: tuple[float, ...]
    freq_hist_data_bar_values: tuple[float, ...]
    logits_hist_data_bar_heights: tuple[float, ...] = ()
    logits_hist_data_bar_values: tuple[float, ...] = ()
    topkCosSimIndices: tuple[int, ...]
    topkCosSimValues: tuple[float, ...]
    hasVector: bool
    vector: tuple[float, ...]
    vectorDefaultSteerStrength: float
    hookName: str


class ActivationRow(msgspec.Struct, frozen=True, kw_only=True):
    """A text in which the feature is active, token by token.

    ``binMin``, ``binMax`` and ``binContains`` say from which interval of activations it was
    drawn, and what share of them lies there; the strongest of all have -1, the maximum, -1.
    """

    id: str
    modelId: str
    layer: str
    index: str
    creatorId: str
    createdAt: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    maxValue: float
    maxValueTokenIndex: int
    minValue: float
    binMin: float
    binMax: float
    binContains: float
    qualifyingTokenIndex: int


class ExplanationRow(msgspec.Struct, frozen=True, kw_only=True):
    """``notes`` is JSON of ours: how well the label predicts the feature."""

    id: str
    modelId: str
    layer: str
    index: str
    authorId: str
    description: str
    typeName: str
    explanationModelName: str
    notes: str | None
    umap_x: float
    umap_y: float
    umap_cluster: int
    createdAt: str


class ExplanationTypeRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    displayName: str
    description: str
    featured: bool = False
    creatorName: str
    creatorId: str


class ExplanationModelRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    displayName: str
    description: str
    featured: bool = False
    creatorName: str
