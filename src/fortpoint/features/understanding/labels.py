"""A rule in a few words: "San Francisco ('Francisco' after 'San'), near bay / bridge".

What speaks for the feature most comes first. A label says what the rule says and nothing else;
for a feature without a rule it names what the feature makes the model write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fortpoint.features.understanding.index import Effect, Rule, Term
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.rules import Fitted
from fortpoint.features.understanding.terms import Kind, TermSpace, name
from fortpoint.features.understanding.writing import quoted, visible

MAX_CHARS = 120
_SHOWN = 4
_LEAST_SHARE = 0.08

_HERE = (Kind.PHRASE, Kind.WORD, Kind.TOKEN, Kind.CLASS, Kind.SHAPE, Kind.ENDING, Kind.BEGINNING)
_BEFORE = (Kind.BEFORE_WORD, Kind.BEFORE, Kind.BEFORE_CLASS, Kind.BEFORE_SHAPE)
_NEXT = (Kind.NEXT, Kind.NEXT_CLASS, Kind.NEXT_SHAPE)
_NEAR = (Kind.NEAR, Kind.NEAR_CLASS, Kind.TOPIC)
_SLOTS: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    ("{}", _HERE),
    ("after {}", _BEFORE),
    ("before {}", _NEXT),
    ("in text with {}", _NEAR),
    ("{}", (Kind.PLACE,)),
    ("in {} text", (Kind.ROLE,)),
)


def rule_of(fitted: Fitted, space: TermSpace, lexicon: Lexicon) -> Rule:
    """The fitted rule in writing."""
    terms = []
    for column, weight in zip(fitted.columns.tolist(), fitted.weights.tolist(), strict=True):
        kind, value = space.term(column)
        terms.append(Term(kind.value, name(kind, value, lexicon), weight))
    return Rule(fitted.bias, tuple(terms))


def label_of(
    rule: Rule | None, recalls: Sequence[float], promoted: Iterable[Effect], lexicon: Lexicon
) -> str:
    """``recalls`` are the shares of active tokens at which each of the rule's terms holds."""
    if rule is None or not rule.terms:
        written = " / ".join(quoted(effect.token) for effect in list(promoted)[:3])
        return f"no pattern found; raises {written}" if written else "no pattern found"
    worth = [term.weight * recall for term, recall in zip(rule.terms, recalls, strict=True)]
    least = _LEAST_SHARE * sum(worth)
    slots: list[tuple[float, str]] = []
    for form, kinds in _SLOTS:
        members = [(w, t) for w, t in zip(worth, rule.terms, strict=True) if t.kind in kinds]
        shown = [t for w, t in sorted(members, key=lambda m: -m[0])[:_SHOWN] if w >= least]
        if shown:
            values = dict.fromkeys(spoken(term, lexicon) for term in shown)
            slots.append((sum(w for w, _ in members), form.format(" / ".join(values))))
    slots.sort(key=lambda slot: -slot[0])
    return _joined([text for _, text in slots])


def spoken(term: Term, lexicon: Lexicon) -> str:
    """One term as a reader would say it."""
    kind = Kind(term.kind)
    if kind in (Kind.CLASS, Kind.BEFORE_CLASS, Kind.NEXT_CLASS, Kind.NEAR_CLASS, Kind.TOPIC):
        return f"words like {lexicon.classes.names[int(term.value)]}"
    if kind in (Kind.SHAPE, Kind.BEFORE_SHAPE, Kind.NEXT_SHAPE, Kind.PLACE, Kind.ROLE):
        return term.value
    if kind in (Kind.ENDING, Kind.BEGINNING):
        return f"words {'ending' if kind is Kind.ENDING else 'beginning'} {term.value}"
    if kind is Kind.TOKEN:
        return quoted(term.value)
    return " ".join(_word(part, lexicon) for part in term.value.split(" ") if part) or "a space"


def _word(written: str, lexicon: Lexicon) -> str:
    number = lexicon.find(written)
    shown = written if number is None else lexicon.surface(number)
    return shown if shown.isalnum() else quoted(shown)


def _joined(parts: Sequence[str]) -> str:
    """As many parts as have room; the first always, cut if it must be."""
    text = visible(parts[0])[:MAX_CHARS]
    for part in parts[1:]:
        if len(text) + len(part) + 2 > MAX_CHARS:
            break
        text += ", " + visible(part)
    return text
