"""What an operator has watched in every request, as the configuration writes it.

    watched(config)          # {"golden-gate": 0.8, "l15/1207": 0.5}

Whether a target is loaded is known to the engine alone; it does not start without one, because
a server that ran on would look just like one that sees nothing.
"""

from __future__ import annotations

import math
import re

from fortpoint.config import Config
from fortpoint.errors import ConfigError

MAX_WATCHED = 64

_MOST_UNITS = 100.0
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[0-9]{1,7})?")


def watched(config: Config) -> dict[str, float]:
    """Each target of ``watch.targets`` and the reading above which it alerts.

    Raises ``ConfigError``, also where no model of our own answers.
    """
    found: dict[str, float] = {}
    for written in config.watch.targets:
        name, colon, above = written.partition(":")
        if not _TARGET.fullmatch(name):
            raise ConfigError(
                f"watch.targets: {written[:128]!r} is neither a direction's name nor "
                "<dictionary>/<index>"
            )
        if name in found:
            raise ConfigError(f"watch.targets: {name} is named twice")
        found[name] = _threshold(name, above) if colon else config.watch.threshold
    if len(found) > MAX_WATCHED:
        raise ConfigError(f"watch.targets: {len(found)} targets; at most {MAX_WATCHED}")
    if found and config.engine.kind == "upstream":
        raise ConfigError(
            "watch.targets: what an upstream server answers cannot be read inside; it needs "
            "engine.kind = embedded"
        )
    return found


def _threshold(name: str, above: str) -> float:
    try:
        value = float(above)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST_UNITS:
        raise ConfigError(
            f"watch.targets: the threshold of {name} is a number above 0, at most "
            f"{_MOST_UNITS:g}, in units of its training maximum"
        )
    return value
