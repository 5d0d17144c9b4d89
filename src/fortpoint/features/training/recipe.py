"""A recipe: everything that makes one dictionary, in a TOML file, so that it can be made again.

    name = "smollm2-135m-l15"
    model = "smollm2-135m"
    layer = 15
    texts = ["text.jsonl.gz"]     # beside the recipe, or absolute
    n_held_out = 2                # shards that are measured on

    [harvest]
    tokens = 12_000_000
    context = 512

    [training]
    architecture = "batchtopk"
    d_sae = 4608
    k = 40

A key that is not known is refused, and the nearest one named.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fortpoint.errors import ConfigError
from fortpoint.features.training.settings import Settings

_MAX_BYTES = 256 * 1024


class Harvest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``tokens`` 0 takes all text there is; ``max_gib`` bounds what is written."""

    tokens: Annotated[int, Meta(ge=0)] = 0
    context: Annotated[int, Meta(ge=2, le=131_072)] = 512
    max_gib: Annotated[float, Meta(gt=0)] = 32.0
    seed: int = 0


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``texts`` are JSONL files of ``{text}`` or ``{messages}``, gzipped or not."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    model: Annotated[str, Meta(min_length=1, max_length=64)]
    layer: Annotated[int, Meta(ge=0)]
    texts: Annotated[tuple[str, ...], Meta(min_length=1)]
    n_held_out: Annotated[int, Meta(ge=1)] = 2
    harvest: Harvest = Harvest()
    training: Settings = Settings()


def read(path: Path) -> Recipe:
    """Raises ``ConfigError``, which names what is wrong."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes")
    try:
        tree = tomllib.loads(raw.decode())
        _check_keys(tree, Recipe, path.name)
        recipe = msgspec.convert(tree, Recipe)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    recipe.training.check()
    return recipe


def _check_keys(tree: dict[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    known = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where} has the unknown key {key[:64]!r}; did you mean {near!r}?")
        inner = known[key]
        if isinstance(value, dict) and isinstance(inner, type):
            _check_keys(value, inner, f"{where}, [{key}]")
