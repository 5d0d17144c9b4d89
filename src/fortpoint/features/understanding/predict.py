"""What a stored rule says of any text: for whoever has the index alone.

lexicon = lexicon_of(index, texts)
predict(index.features[417].rule, Passages.of_texts([tokens], role=1), lexicon) > 0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.features.understanding.index import Index, Rule
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.passages import Passages
from fortpoint.features.understanding.terms import Kind, Readings, read, value
from fortpoint.features.understanding.token_classes import TokenClasses


def lexicon_of(index: Index, texts: Sequence[str]) -> Lexicon:
    """``texts`` of every token id of the model. Raises ``ModelError`` for another vocabulary."""
    classes = TokenClasses.stored(index.header.classes, index.header.class_of_token)
    if len(classes.of_token) != len(texts):
        raise ModelError("the index was made for a model with other tokens")
    return Lexicon(texts, classes)


def predict(rule: Rule, passages: Passages, lexicon: Lexicon) -> NDArray[np.float64]:
    """One number for each token: above 0 the rule says that the feature is active."""
    return predict_from(rule, read(passages, lexicon), len(passages), lexicon)


def predict_from(
    rule: Rule, readings: Readings, n_tokens: int, lexicon: Lexicon
) -> NDArray[np.float64]:
    """The same of terms that were read before. Raises ``ModelError`` for a kind of term that
    is not known."""
    scores = np.full(n_tokens, rule.bias)
    for term in rule.terms:
        try:
            kind = Kind(term.kind)
        except ValueError:
            raise ModelError(f"a rule has a term of the kind {term.kind!r}") from None
        wanted = value(kind, term.value, lexicon)
        if wanted is not None:
            rows, found = readings[kind]
            scores[np.unique(rows[found == wanted])] += term.weight
    return scores
