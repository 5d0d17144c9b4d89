"""Rules, labels and their scores for all features of a survey, without a labelling model.

named = name_all(survey, lexicon, alike, promoted, settings, progress)
named.labels[3], named.rules[3], named.scores[3]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fortpoint.features.understanding import rules, scoring
from fortpoint.features.understanding.examples import Examples
from fortpoint.features.understanding.index import Effect, Rule
from fortpoint.features.understanding.labels import label_of, rule_of
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.rules import Table
from fortpoint.features.understanding.survey import Part, Survey
from fortpoint.features.understanding.terms import TermSpace, read

Numbers = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

DEAD = "never active"
_MIN_COUNT = 6


@dataclass(frozen=True)
class Settings:
    rules: rules.Settings = field(default_factory=rules.Settings)
    scoring: scoring.Settings = field(default_factory=scoring.Settings)


@dataclass(frozen=True, eq=False)
class Named:
    """One of each for every feature; a rule or a score is None where text was too little."""

    labels: list[str]
    rules: list[Rule | None]
    scores: list[scoring.Score | None]


def name_all(
    survey: Survey,
    lexicon: Lexicon,
    alike: Numbers,
    promoted: Sequence[Sequence[Effect]],
    settings: Settings,
    progress: Progress,
) -> Named:
    """``alike`` ``[n_features, n]`` are features of similar direction, for the hard cases."""
    space, study = _learned(survey.study, lexicon)
    unseen = _seen_with(survey.held_out, space, lexicon)
    examples = Examples(survey.study.passages, study, lexicon)
    named = Named([], [], [])
    n_features = len(survey.counts)
    for feature in range(n_features):
        fitted = rules.learn(study, feature, alike[feature], settings.rules)
        rule = None if fitted is None else rule_of(fitted, space, lexicon)
        worth = [] if fitted is None else fitted.worth.tolist()
        label = DEAD
        if survey.counts[feature]:
            own = examples.of(feature, () if rule is None else rule.terms)
            label = label_of(rule, worth, promoted[feature], lexicon, own)
        trial = scoring.trial(unseen, feature, alike[feature], settings.scoring)
        named.labels.append(label)
        named.rules.append(rule)
        named.scores.append(None if trial is None else scoring.judge(unseen, fitted, trial))
        if feature % 64 == 63 or feature + 1 == n_features:
            progress("label", feature + 1, n_features)
    return named


def _learned(part: Part, lexicon: Lexicon) -> tuple[TermSpace, Table]:
    readings = read(part.passages, lexicon)
    space = TermSpace.learn(readings, len(part.passages), _MIN_COUNT)
    terms = space.incidence(readings, len(part.passages))
    return space, Table.of(terms, part.by_feature, part.kept)


def _seen_with(part: Part, space: TermSpace, lexicon: Lexicon) -> Table:
    terms = space.incidence(read(part.passages, lexicon), len(part.passages))
    return Table.of(terms, part.by_feature, part.kept)
