"""Payment numbers that carry their own check: cards (ISO/IEC 7812) and accounts (ISO 13616)."""

from __future__ import annotations

import re

# Issuers' leading digits, and how many digits their cards have.
_ISSUERS = (
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|2(22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"3(0[0-5]|[689])"), (14,)),
    (re.compile(r"6(011|5|4[4-9]|2)|35(2[89]|[3-8])"), (16,)),
)

# How long an account number is in each country (ISO 13616 registry).
_IBAN_CHARS = {
    **dict.fromkeys(("NO",), 15),
    **dict.fromkeys(("BE",), 16),
    **dict.fromkeys(("DK", "FO", "GL", "FI", "NL"), 18),
    **dict.fromkeys(("MK", "SI"), 19),
    **dict.fromkeys(("AT", "BA", "EE", "KZ", "LT", "LU", "XK"), 20),
    **dict.fromkeys(("CH", "CR", "HR", "LI", "LV"), 21),
    **dict.fromkeys(("BG", "BH", "DE", "GB", "GE", "IE", "ME", "RS"), 22),
    **dict.fromkeys(("AE", "GI", "IL", "IQ", "OM"), 23),
    **dict.fromkeys(("AD", "CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "TN", "VA"), 24),
    **dict.fromkeys(("PT", "ST"), 25),
    **dict.fromkeys(("IS", "TR"), 26),
    **dict.fromkeys(("FR", "GR", "IT", "MC", "SM"), 27),
    **dict.fromkeys(("AL", "AZ", "BY", "CY", "DO", "GT", "HU", "LB", "PL"), 28),
    **dict.fromkeys(("BR", "PS", "QA", "UA"), 29),
    **dict.fromkeys(("JO", "KW", "MU"), 30),
    **dict.fromkeys(("MT", "SC"), 31),
}


_DOUBLED = str.maketrans("0123456789", "0246813579")


def accept_card(text: str) -> tuple[int, int] | None:
    """The longest card number that ``text`` begins with, alone or before an expiry date."""
    places = _places(text)
    digits = "".join(text[place] for place in places)
    for leading, lengths in _ISSUERS:
        if leading.match(digits):
            for length in reversed(lengths):
                end = _end_of(text, places, length)
                if end is not None and _luhn(digits[:length]):
                    return 0, end
    return None


def accept_iban(text: str) -> tuple[int, int] | None:
    """The account number that ``text`` begins with, when country, length and check agree."""
    length = _IBAN_CHARS.get(text[:2])
    if length is None:
        return None
    end = _end_of(text, _places(text), length)
    if end is None:
        return None
    compact = text[:end].replace(" ", "")
    moved = compact[4:] + compact[:4]
    return (0, end) if int("".join(str(int(char, 36)) for char in moved)) % 97 == 1 else None


def _places(text: str) -> list[int]:
    """Where its letters and digits are."""
    return [place for place, char in enumerate(text) if char not in " -"]


def _end_of(text: str, places: list[int], n: int) -> int | None:
    """Where the first ``n`` letters and digits end, when a word ends there too."""
    if len(places) < n:
        return None
    end = places[n - 1] + 1
    return None if end < len(text) and text[end] not in " -" else end


def _luhn(digits: str) -> bool:
    return sum(map(int, digits[-1::-2] + digits[-2::-2].translate(_DOUBLED))) % 10 == 0
