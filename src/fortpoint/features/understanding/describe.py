"""Makes the index of a dictionary from a harvest: everything that is known, in one go.

    index = describe(store, dictionary, model, settings, progress)
    index.save(folder)

The harvest is read once; labels are learned from a part of it and judged on shards that were
not read for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.activations import ActivationStore
from fortpoint.features.sae import Dictionary
from fortpoint.features.understanding import naming
from fortpoint.features.understanding import survey as surveying
from fortpoint.features.understanding.cluster_names import names
from fortpoint.features.understanding.clusters import Clusters, cluster
from fortpoint.features.understanding.contexts import choose, contexts
from fortpoint.features.understanding.effects import Effects, effects
from fortpoint.features.understanding.index import (
    VERSION,
    Cluster,
    Context,
    Effect,
    Feature,
    Header,
    Index,
    Keyword,
    Kin,
)
from fortpoint.features.understanding.keywords import keywords
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.neighbours import Nearest, coactive, nearest, together
from fortpoint.features.understanding.survey import Survey, survey
from fortpoint.features.understanding.token_classes import TokenClasses

Progress = Callable[[str, int, int], None]

_LEAST_TOKEN_COUNT = 3
_N_ALIKE = 8


@dataclass(frozen=True)
class Settings:
    """What is kept of each feature. ``n_lesser`` contexts (at most 2) are of lesser strength;
    ``reach`` is how many tokens a context shows before and after its own."""

    survey: surveying.Settings = field(default_factory=surveying.Settings)
    naming: naming.Settings = field(default_factory=naming.Settings)
    n_contexts: int = 8
    n_lesser: int = 2
    reach: tuple[int, int] = (12, 6)
    n_promoted: int = 10
    n_suppressed: int = 10
    n_kin: int = 6
    n_encoder_kin: int = 6
    n_bins: int = 12
    n_keywords: int = 8
    n_clusters: int | None = None
    seed: int = 0


COMPACT = Settings(
    n_contexts=3,
    n_lesser=1,
    n_promoted=4,
    n_suppressed=2,
    n_kin=3,
    n_encoder_kin=0,
    n_bins=8,
    n_keywords=4,
    reach=(8, 2),
)
"""For an index that ships: about 260 bytes a feature."""


@dataclass(frozen=True, eq=False)
class Model:
    """``texts`` of every token id; ``readout`` ``[n_vocab, d_model]``, the unembedding with the
    final norm folded in."""

    name: str
    digest: str
    texts: Sequence[str]
    readout: NDArray[np.float32]


def describe(
    store: ActivationStore,
    dictionary: Dictionary,
    digest: str,
    model: Model,
    settings: Settings,
    progress: Progress,
) -> Index:
    """``digest`` names the dictionary's weights. Raises ``ModelError``."""
    seen = survey(store, dictionary, settings.survey, progress)
    token_counts = np.bincount(seen.study.passages.tokens, minlength=len(model.texts))
    shown = token_counts >= min(_LEAST_TOKEN_COUNT, int(token_counts.max(initial=1)))
    n_effects = max(settings.n_promoted, settings.n_suppressed)
    said = effects(dictionary.decoder, model.readout, shown, n_effects, progress=progress)
    texts = tuple(model.texts)
    classes = TokenClasses.learn(model.readout, token_counts, texts, seed=settings.seed)
    lexicon = Lexicon(texts, classes)
    lexicon.learn_surfaces(token_counts)
    kin = _kin(dictionary, seen, settings)
    promoted = _effects(said.promoted, said.promoted_values, texts, settings.n_promoted)
    named = naming.name_all(seen, lexicon, kin.alike, promoted, settings.naming, progress)
    chosen = choose(seen, settings.n_contexts, settings.n_lesser)
    shown_contexts = contexts(store, dictionary, seen, chosen, texts, settings.reach)
    in_sight = keywords(seen, lexicon, settings.n_keywords, settings.seed)
    features = _features(
        seen, said, named, kin, shown_contexts, promoted, in_sight, texts, settings
    )
    return _clustered(
        Index(_header(dictionary, digest, model, seen, named, classes), tuple(features)),
        kin.clusters,
    )


@dataclass(frozen=True, eq=False)
class _Kindred:
    decoder: Nearest
    encoder: Nearest
    company: Nearest
    alike: NDArray[np.int64]
    clusters: Clusters


def _kin(dictionary: Dictionary, seen: Survey, settings: Settings) -> _Kindred:
    counts = together(seen.study.active)
    totals = np.bincount(seen.study.active.columns, minlength=dictionary.n_features)
    by_decoder = nearest(dictionary.decoder, max(settings.n_kin, _N_ALIKE))
    return _Kindred(
        decoder=by_decoder,
        encoder=nearest(dictionary.encoder, settings.n_encoder_kin),
        company=coactive(counts, totals, len(seen.study.kept), settings.n_kin),
        alike=by_decoder.features[:, :_N_ALIKE],
        clusters=cluster(dictionary.decoder, counts, totals, settings.n_clusters, settings.seed),
    )


def recluster(
    index: Index, dictionary: Dictionary, part: surveying.Part, n: int | None, seed: int
) -> Index:
    """The same index with other clusters and another map."""
    counts = together(part.active)
    totals = np.bincount(part.active.columns, minlength=dictionary.n_features)
    return _clustered(index, cluster(dictionary.decoder, counts, totals, n, seed))


def _clustered(index: Index, clusters: Clusters) -> Index:
    from msgspec.structs import replace

    called = names(index.features, clusters.of_feature, clusters.n)
    made = []
    for number, name in enumerate(called):
        places = clusters.xy[clusters.of_feature == number]
        x, y = np.median(places, axis=0).astype(int).tolist()
        made.append(Cluster(name, len(places), x, y))
    features = tuple(
        replace(feature, cluster=own, x=x, y=y)
        for feature, own, (x, y) in zip(
            index.features, clusters.of_feature.tolist(), clusters.xy.tolist(), strict=True
        )
    )
    return Index(replace(index.header, clusters=tuple(made)), features)


def _features(
    seen: Survey,
    said: Effects,
    named: naming.Named,
    kin: _Kindred,
    shown: Sequence[Sequence[Context]],
    promoted: Sequence[tuple[Effect, ...]],
    in_sight: Sequence[tuple[Keyword, ...]],
    texts: Sequence[str],
    settings: Settings,
) -> list[Feature]:
    histogram = seen.histogram(settings.n_bins)
    suppressed = _effects(said.suppressed, said.suppressed_values, texts, settings.n_suppressed)
    features = []
    for i, score in enumerate(named.scores):
        alive = bool(seen.counts[i])
        features.append(
            Feature(
                index=i,
                label=named.labels[i],
                label_score=None if score is None else round(score.balanced, 3),
                labeller="",
                rule=named.rules[i],
                frequency=float(f"{seen.frequency[i]:.3g}"),
                max_activation=float(f"{seen.maximum[i]:.4g}"),
                histogram=tuple(histogram[i].tolist()) if alive else (),
                contexts=tuple(shown[i]),
                promoted=promoted[i],
                suppressed=suppressed[i],
                neighbours=_named_kin(kin.decoder, i, settings.n_kin),
                encoder_neighbours=_named_kin(kin.encoder, i, settings.n_encoder_kin),
                coactive=_named_kin(kin.company, i, settings.n_kin),
                cluster=-1,
                x=0,
                y=0,
                keywords=in_sight[i],
            )
        )
    return features


def _header(
    dictionary: Dictionary,
    digest: str,
    model: Model,
    seen: Survey,
    named: naming.Named,
    classes: TokenClasses,
) -> Header:
    scores = [score for score in named.scores if score is not None]
    return Header(
        version=VERSION,
        dictionary=dictionary.name,
        model=model.name,
        model_digest=model.digest,
        digest=digest,
        layer=dictionary.layer,
        n_features=dictionary.n_features,
        n_tokens=seen.n_tokens,
        n_held_out_tokens=len(seen.held_out.kept),
        n_dead=int((seen.counts == 0).sum()),
        n_judged=len(scores),
        mean_score=_mean([score.balanced for score in scores]),
        mean_score_random=_mean([score.balanced_random for score in scores]),
        clusters=(),
        classes=classes.names,
        class_of_token=classes.of_token.astype("<i2").tobytes(),
    )


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _effects(
    tokens: NDArray[np.int64], values: NDArray[np.float32], texts: Sequence[str], n: int
) -> list[tuple[Effect, ...]]:
    return [
        tuple(
            Effect(texts[token], float(f"{value:.2g}"))
            for token, value in zip(row[:n].tolist(), row_values[:n].tolist(), strict=True)
        )
        for row, row_values in zip(tokens, values, strict=True)
    ]


def _named_kin(found: Nearest, feature: int, n: int) -> tuple[Kin, ...]:
    pairs = zip(
        found.features[feature, :n].tolist(), found.closeness[feature, :n].tolist(), strict=True
    )
    return tuple(Kin(other, round(100 * near)) for other, near in pairs if other >= 0)
