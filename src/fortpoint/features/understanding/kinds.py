"""Words that are asked for by the name of their kind: "months", "question words", "negation".

A feature for the months is known by January and March, and seldom by the word "month". Only
kinds with few members are here, all of which stand in any grammar; and what programs and tables
write for a word.
"""

from __future__ import annotations

from collections.abc import Sequence

_KINDS = {
    "month": "january february march april may june july august september october november "
    "december",
    "season": "spring summer autumn fall winter",
    "weekday": "monday tuesday wednesday thursday friday saturday sunday",
    "day week": "monday tuesday wednesday thursday friday saturday sunday",
    "question word": "who what when where which why how whose",
    "interrogative": "who what when where which why how whose",
    "negation": "not no never none nothing nobody neither nor cannot don't doesn't didn't can't",
    "negative": "not no never none nothing nobody neither nor cannot don't doesn't didn't can't",
    "pronoun": "i you he she it we they me him her us them",
    "possessive": "my your his her its our their",
    "reflexive": "myself yourself himself herself itself ourselves themselves",
    "demonstrative": "this that these those",
    "article": "the a an",
    "preposition": "of in on at by for with from to into over under between through",
    "conjunction": "and or but because although while if unless",
    "modal": "can could may might must shall should will would",
    "auxiliary": "be is are was were been being have has had do does did",
    "compass": "north south east west",
    "colour": "red orange yellow green blue purple brown black white grey",
    "color": "red orange yellow green blue purple brown black white gray",
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "woman": "she her hers herself girl lady",
    "female": "she her hers herself woman girl lady",
    "man": "he his him himself boy",
    "male": "he his him himself man boy",
    "kilometre": "km kilometer",
    "kilometer": "km kilometre",
    "metre": "m meter",
    "square": "sq",
    "function": "def",
    "loop": "for while",
    "condition": "if elif else",
    "exception": "raise except try error",
    "boolean": "true false",
}
_BY_NAME = {frozenset(name.split()): tuple(members.split()) for name, members in _KINDS.items()}


def members(asked: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each kind that is asked for, the first of its words in the query and its members."""
    words = frozenset(asked)
    return {
        next(word for word in asked if word in name): found
        for name, found in _BY_NAME.items()
        if name <= words
    }
