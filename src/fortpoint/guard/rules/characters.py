"""What the characters of a text give away: hidden ones, codes, and scripts that change.

    find_oddities("pay\u202e load")     # (Finding(3, 4, 'invisible_text', 'bidi_control', 0.9),)

Each is a reason to look closer and no proof: people paste soft hyphens, and languages meet in
honest texts. What writing needs is left alone: joiners in emoji and in scripts that join
letters, a byte order mark at the start, the tags of a flag.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from fortpoint.guard.obfuscation.forms import coded
from fortpoint.guard.obfuscation.letters import hidden_bytes
from fortpoint.guard.rules.finding import Finding

INVISIBLE_TEXT = "invisible_text"
ENCODED_TEXT = "encoded_text"
SCRIPT_SWITCH = "script_switch"

MIN_OTHER_LETTERS = 12

# Of each kind of hidden characters: the runs that no writing needs, and how sure it is.
_HIDDEN = (
    (
        "tag_characters",
        0.99,
        r"(?<!\U0001f3f4)(?<![\U000e0020-\U000e007f])[\U000e0001-\U000e007f]+",
    ),
    ("bidi_control", 0.9, "[\u202a-\u202e\u2066-\u2069]+"),
    ("variation_selectors", 0.9, "[\ufe00-\ufe0f\U000e0100-\U000e01ef]{2,}"),
    ("invisible_operators", 0.9, "[\u2060-\u2064\u206a-\u206f\u180e\ufff9-\ufffb]+"),
    ("blank_letters", 0.9, "[\u115f\u1160\u3164\uffa0]+"),
    ("zero_width", 0.8, "(?<=[\\x21-\\x7e])[\u200b-\u200d\ufeff\u00ad]+(?=[\\x21-\\x7e])"),
    ("zero_width", 0.8, "[\u200b-\u200d\ufeff]{3,}"),
)
_HIDDEN_RUNS = tuple((kind, score, re.compile(pattern)) for kind, score, pattern in _HIDDEN)
_WORD = re.compile(r"[^\W\d_]+")
_LOOK_LATIN = frozenset({"CYRILLIC", "GREEK", "CHEROKEE", "ARMENIAN"})


def find_oddities(text: str) -> tuple[Finding, ...]:
    """Hidden characters, codes and changes of script, in order."""
    return tuple(sorted([*_invisible(text), *_encoded(text), *_switches(text)]))


def _invisible(text: str) -> Iterator[Finding]:
    if text.isascii():
        return
    for kind, score, pattern in _HIDDEN_RUNS:
        for run in pattern.finditer(text):
            yield Finding(run.start(), run.end(), INVISIBLE_TEXT, kind, score)


def _encoded(text: str) -> Iterator[Finding]:
    for span in (*hidden_bytes(text), *coded(text)):
        yield Finding(span.start, span.end, ENCODED_TEXT, span.kind, 0.9)


@lru_cache(maxsize=20_000)
def _script(char: str) -> str:
    """The first word of the character's name, which is its script; kana and han are one."""
    script = unicodedata.name(char, "UNKNOWN").partition(" ")[0]
    return "CJK" if script in {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"} else script


def _switches(text: str) -> Iterator[Finding]:
    """Words of two scripts that look alike, and passages in another script than the rest."""
    if text.isascii():
        return
    letters = Counter[str]()
    passages: list[tuple[str, int, int, int]] = []
    for word in _WORD.finditer(text):
        scripts = Counter(map(_script, word[0]))
        letters += scripts
        if len(word[0]) > 2 and "LATIN" in scripts and scripts.keys() & _LOOK_LATIN:
            yield Finding(word.start(), word.end(), SCRIPT_SWITCH, "mixed_word", 0.9)
        script = scripts.most_common(1)[0][0]
        if passages and passages[-1][0] == script:
            _, start, _, n = passages.pop()
            passages.append((script, start, word.end(), n + len(word[0])))
        else:
            passages.append((script, word.start(), word.end(), len(word[0])))
    main = letters.most_common(1)[0][0] if letters else ""
    for script, start, end, n in passages:
        if script != main and n >= MIN_OTHER_LETTERS:
            yield Finding(start, end, SCRIPT_SWITCH, "other_script", 0.5)
