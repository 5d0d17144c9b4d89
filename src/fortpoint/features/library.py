"""All dictionaries and directions of this installation, and how a request names one.

    features/
      <dictionary>/cfg.json, sae_weights.safetensors, [feature_stats.safetensors]
      directions/<direction>.json, <direction>.safetensors

A target is ``"<dictionary>/<index>"`` or the name of a direction. What is broken or was made
for another model is left out with its reason, which a request that names it is told; the
engine starts all the same. Names are looked up among what was loaded and never become paths.

Dictionaries that come with the product (``shipped.py``) stand beside the home's own; one of the
home's takes the place of a shipped one of its name, also where it cannot be loaded: the same
name must not come to mean other features.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import InvalidRequest, ModelError
from fortpoint.features.directions import Direction
from fortpoint.features.sae import CONFIG, Dictionary

DIRECTIONS = "directions"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_INDEX_DIGITS = 7
_SHOWN_NAMES = 5

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Target:
    """One feature or direction, ready to be read and steered at ``layer``.

    With residual ``x``: ``z = x . encoder + bias``, activation ``z`` where ``z > threshold``,
    else 0. ``encoder`` and ``decoder`` are ``[d_model]`` float32. For a dictionary that keeps
    the k largest of a token, whether others are larger is not looked at.
    """

    name: str
    layer: int
    encoder: NDArray[np.float32]
    bias: float
    threshold: float
    decoder: NDArray[np.float32]
    training_max: float


@dataclass(frozen=True, eq=False)
class Library:
    """``left_out`` maps the name of what could not be loaded to the reason."""

    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict)
    directions: Mapping[str, Direction] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls, folder: Path | None, d_model: int, n_layers: int, shipped: Sequence[Path] = ()
    ) -> Library:
        """Everything in ``folder`` that fits the model, and the ``shipped`` dictionaries.

        A folder that is None or absent is empty.
        """
        left_out: dict[str, str] = {}
        own = [] if folder is None else list(_dictionary_folders(folder))
        taken = {path.name for path in own}
        dictionaries = _load_all(
            [*(path for path in shipped if path.name not in taken), *own],
            left_out,
            lambda p: Dictionary.load(p, d_model, n_layers),
        )
        directions = _load_all(
            [] if folder is None else _direction_stems(folder / DIRECTIONS),
            left_out,
            lambda p: Direction.load(p, d_model, n_layers),
        )
        for name in dictionaries.keys() & directions.keys():
            left_out[name] = "a dictionary has the same name"
            del directions[name]
        return cls(dictionaries, directions, left_out)

    def dictionary(self, name: str) -> Dictionary:
        """Raises ``InvalidRequest`` for a name that is not here."""
        found = self.dictionaries.get(name)
        if found is None:
            raise self._unknown("dictionary", name, self.dictionaries)
        return found

    def resolve(self, target: str) -> Target:
        """The feature or direction of this name. Raises ``InvalidRequest``."""
        name, slash, index = target.partition("/")
        if slash:
            return _feature(self.dictionary(name), index)
        found = self.directions.get(target)
        if found is None:
            raise self._unknown("direction", target, self.directions)
        return Target(
            name=target,
            layer=found.layer,
            encoder=found.vector,
            bias=-found.bias,
            threshold=0.0,
            decoder=found.steering,
            training_max=found.training_max,
        )

    def _unknown(self, kind: str, name: str, known: Mapping[str, object]) -> InvalidRequest:
        shown = repr(name[:64])
        if name in self.left_out:
            return InvalidRequest(f"{shown} could not be loaded: {self.left_out[name]}")
        if name in self.dictionaries:
            return InvalidRequest(f"{shown} is a dictionary; name a feature of it as {name}/0")
        near = difflib.get_close_matches(name[:64], known, n=_SHOWN_NAMES, cutoff=0.0)
        more = ", ..." if len(known) > len(near) else ""
        here = f"{len(known)} here: {', '.join(near)}{more}" if near else "none is here"
        return InvalidRequest(f"there is no {kind} {shown} ({here})")


def check_name(name: str) -> None:
    """Raises ``InvalidRequest`` for what can be no dictionary's or direction's name."""
    if not _NAME.fullmatch(name) or name == DIRECTIONS:
        raise InvalidRequest(
            "a name has letters, digits, '.', '_' and '-' only, 64 at most, and begins with a "
            "letter or digit",
            param="name",
        )


def _feature(dictionary: Dictionary, index: str) -> Target:
    n = dictionary.n_features
    sound = index.isascii() and index.isdigit() and len(index) <= _MAX_INDEX_DIGITS
    if not sound or int(index) >= n:
        raise InvalidRequest(f"{dictionary.name} has the features 0 to {n - 1}, not {index[:64]!r}")
    i = int(index)
    encoder = dictionary.encoder[i]
    offset = encoder.astype(np.float64) @ dictionary.center.astype(np.float64)
    return Target(
        name=f"{dictionary.name}/{i}",
        layer=dictionary.layer,
        encoder=encoder,
        bias=float(dictionary.bias[i] - offset),
        threshold=float(dictionary.threshold[i]),
        decoder=dictionary.decoder[i],
        training_max=float(dictionary.training_max[i]),
    )


def _dictionary_folders(folder: Path) -> Iterator[Path]:
    for config in sorted(folder.glob(f"*/{CONFIG}")):
        if config.parent.name != DIRECTIONS:
            yield config.parent


def _direction_stems(folder: Path) -> Iterator[Path]:
    for card in sorted(folder.glob("*.json")):
        yield card.with_name(card.name.removesuffix(".json"))


def _load_all(
    paths: Iterable[Path], left_out: dict[str, str], load: Callable[[Path], _T]
) -> dict[str, _T]:
    loaded: dict[str, _T] = {}
    for path in paths:
        try:
            if not _NAME.fullmatch(path.name):
                raise ModelError("its name may have letters, digits, '.', '_' and '-' only")
            loaded[path.name] = load(path)
        except ModelError as error:
            left_out[path.name] = error.message
    return loaded
