"""A rule in a few words: "San Francisco ('Francisco' after 'San'), near bay / bridge".

What speaks for the feature most comes first. A label says what the rule says and nothing else;
for a feature without a rule it names what the feature makes the model write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fortpoint.features.understanding.index import Effect, Rule, Term
from fortpoint.features.understanding.lexicon import Lexicon
from fortpoint.features.understanding.rules import Fitted
from fortpoint.features.understanding.terms import Kind, TermSpace, name
from fortpoint.features.understanding.writing import quoted, visible

MAX_CHARS = 120
_SHOWN = 4
_LEAST_SHARE = 0.08
_LEAST_GENERAL_SHARE = 0.25

_HERE = (Kind.PHRASE, Kind.WORD, Kind.TOKEN, Kind.CLASS, Kind.ENDING, Kind.BEGINNING, Kind.SHAPE)
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
_CLASSES = (Kind.CLASS, Kind.BEFORE_CLASS, Kind.NEXT_CLASS, Kind.NEAR_CLASS, Kind.TOPIC)
_AS_WRITTEN = (Kind.SHAPE, Kind.BEFORE_SHAPE, Kind.NEXT_SHAPE, Kind.PLACE, Kind.ROLE)


def rule_of(fitted: Fitted, space: TermSpace, lexicon: Lexicon) -> Rule:
    """The fitted rule in writing."""
    terms = []
    for column, weight in zip(fitted.columns.tolist(), fitted.weights.tolist(), strict=True):
        kind, value = space.term(column)
        terms.append(Term(kind.value, name(kind, value, lexicon), weight))
    return Rule(fitted.bias, tuple(terms))


def label_of(
    rule: Rule | None,
    worth: Sequence[float],
    promoted: Iterable[Effect],
    lexicon: Lexicon,
    examples: Mapping[Term, Sequence[str]],
) -> str:
    """``worth`` says what each of the rule's terms does for it (``Fitted.worth``); ``examples``
    has words of the feature's own for terms that name a class."""
    if rule is None or not rule.terms:
        written = " / ".join(quoted(effect.token) for effect in list(promoted)[:3])
        return f"no pattern found; raises {written}" if written else "no pattern found"
    told = _worth_telling(rule.terms, worth)
    slots: list[tuple[float, str]] = []
    for form, kinds in _SLOTS:
        members = [(w, term) for w, term in told if term.kind in kinds][:_SHOWN]
        if members:
            values = dict.fromkeys(
                spoken(term, lexicon, examples.get(term, ())) for _, term in members
            )
            slots.append((sum(w for w, _ in members), form.format(" / ".join(values))))
    slots.sort(key=lambda slot: -slot[0])
    return _joined([text for _, text in slots])


def _worth_telling(terms: Sequence[Term], worth: Sequence[float]) -> list[tuple[float, Term]]:
    """The terms that say most, the most first.

    A general one (a shape, a place, a first letter) only where it says much, or where there is
    nothing better.
    """
    ranked = sorted(zip(worth, terms, strict=True), key=lambda pair: -pair[0])
    total = sum(worth)
    special = [pair for pair in ranked if not _general(pair[1])]
    special = [pair for pair in special if pair[0] >= _LEAST_SHARE * total]
    least = _LEAST_GENERAL_SHARE if special else _LEAST_SHARE
    general = [pair for pair in ranked if _general(pair[1]) and pair[0] >= least * total]
    return [*special, *general] or ranked[:1]


def _general(term: Term) -> bool:
    one_letter = term.kind == Kind.BEGINNING and len(term.value) == 2
    return one_letter or term.kind in _AS_WRITTEN


def spoken(term: Term, lexicon: Lexicon, examples: Sequence[str] = ()) -> str:
    """One term as a reader would say it."""
    kind = Kind(term.kind)
    if kind in _CLASSES:
        shown = [_word(word, lexicon) for word in examples]
        return f"words like {'/'.join(shown) or lexicon.classes.names[int(term.value)]}"
    if kind in _AS_WRITTEN:
        return term.value
    if kind in (Kind.ENDING, Kind.BEGINNING):
        return f"{term.value} words"
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
