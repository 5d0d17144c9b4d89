"""Write constraints.txt: the exact version of every package that Fort Point needs.

The list is the closure of pyproject.toml's dependencies and extras, in the versions that
this environment has. Local version suffixes are cut (``2.13.0+cpu`` is ``2.13.0``), so that
a build of torch for another device fits too.

    .venv/bin/python scripts/pin_dependencies.py          # rewrite constraints.txt
    .venv/bin/python scripts/pin_dependencies.py --check  # fail when it is not current

It does not pin hashes: the package index that pip is set to use is trusted for those.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = frozenset({"dev", "train"})
TARGET = Path(__file__).resolve().parent.parent / "constraints.txt"
HEADER = "# Made by scripts/pin_dependencies.py (`make pin`). Do not edit.\n"


def pins() -> dict[str, str]:
    """Canonical name to exact version, for the whole tree."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting: list[tuple[str, frozenset[str]]] = [("fortpoint", EXTRAS)]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        found[name] = distribution.version.partition("+")[0]
        waiting.extend(_requirements(distribution, extras))
    del found["fortpoint"]
    # The build backend is pinned too: `make` builds without pip's isolated environment.
    found["setuptools"] = metadata.version("setuptools")
    return dict(sorted(found.items()))


def _requirements(
    distribution: metadata.Distribution, extras: frozenset[str]
) -> Iterator[tuple[str, frozenset[str]]]:
    for line in distribution.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def render() -> str:
    return HEADER + "".join(f"{name}=={version}\n" for name, version in pins().items())


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.read_text(encoding="utf-8") == text else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
