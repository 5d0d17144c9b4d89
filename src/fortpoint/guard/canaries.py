"""Where the texts are that must never come out: read before the process gives its files up.

    load_canaries(("env:CANARY", "file:/etc/fortpoint/canary"))   # {"env:CANARY": "...", ...}

A canary is planted in a system prompt (or wherever else the model reads what callers must not):
an answer that tells it shows that the rest can be had as well. It is named, never written, in
the configuration. Findings carry its reference, which may be shown; no error repeats the text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fortpoint.errors import ConfigError

_ENV = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
_FILE = "file:"
_MAX_BYTES = 4096


def canary_variables(references: Sequence[str]) -> frozenset[str]:
    """The environment variables that hold canaries."""
    return frozenset(match[1] for one in references if (match := _ENV.fullmatch(one)))


def load_canaries(
    references: Sequence[str], environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Reference to text, without white space around it. Raises ``ConfigError``."""
    values = os.environ if environ is None else environ
    return {reference: _load(reference, values) for reference in references}


def _load(reference: str, environ: Mapping[str, str]) -> str:
    if match := _ENV.fullmatch(reference):
        value, where = environ.get(match[1], ""), f"the variable {match[1]}"
    elif reference.startswith(_FILE + "/"):
        value, where = _read(Path(reference.removeprefix(_FILE))), "the file that it names"
    else:
        raise ConfigError(
            "guard.canaries: each is env:NAME or file:/path; the text itself does not belong here"
        )
    if not value.strip():
        raise ConfigError(f"guard.canaries: {where} holds no text")
    return value.strip()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"guard.canaries: {path} is longer than {_MAX_BYTES} bytes")
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"guard.canaries: {path} is not text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"guard.canaries: cannot read {path}: {error.strerror}") from None
