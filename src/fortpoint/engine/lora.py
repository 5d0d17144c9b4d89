"""LoRA adapters (arXiv 2106.09685) in PEFT's format, kept beside the model and chosen per request.

    adapters/
        french/adapter_config.json  french/adapter_model.safetensors
        legal/...

    adapters = Adapters.load(folder, architecture)
    pair = adapters["french"].layers[3]["q_proj"]  # y += (x @ pair.A.T) @ pair.B.T

An adapter's folder is its name. Whatever is not understood in full (DoRA, whole modules saved
beside, other kinds of adapters) leaves the adapter out with its reason, and the engine starts
without it: a half-applied adapter would answer in nobody's name. Only safetensors are read, and
every tensor must be of the shape that this model needs.

Not protected here: what an adapter has learned. It can undo the model's restraint as any
fine-tuning can; who may put one into the folder decides that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from fortpoint.engine.architecture import Architecture, module_path
from fortpoint.engine.checkpoint import Checkpoint
from fortpoint.errors import ModelError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_ADAPTERS = 64
MAX_RANK = 256
MAX_BYTES = 1 << 30
"""Of one adapter's weights."""
MAX_CONFIG_BYTES = 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d{1,4})\.((?:self_attn|mlp)\.([a-z]+_proj))"
    r"\.lora_([AB])(?:\.default)?\.weight"
)
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]{1,256}")

Floats = NDArray[np.float32]
_Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Meta(ge=-1e6, le=1e6)]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """What is added to one matrix: ``B @ A``. ``B`` carries the adapter's scale."""

    A: Floats  # [rank, d_in]
    B: Floats  # [d_out, rank]


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """``layers`` has one mapping a block, from a module's name (``q_proj``) to its pair."""

    name: str
    layers: tuple[dict[str, LoraPair], ...]

    @property
    def n_bytes(self) -> int:
        pairs = (pair for layer in self.layers for pair in layer.values())
        return sum(pair.A.nbytes + pair.B.nbytes for pair in pairs)


@dataclass(frozen=True)
class Adapters(Mapping[str, LoraAdapter]):
    """Adapters by name; ``left_out`` has the reason of each that cannot be used."""

    by_name: dict[str, LoraAdapter] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls, folder: Path, architecture: Architecture, base_digest: str | None = None
    ) -> Adapters:
        """All adapters in ``folder``'s folders, in the order of their names.

        ``base_digest`` is the model's; an adapter that names another one is left out. Never
        raises for an adapter, only ``ModelError`` for a ``folder`` that cannot be listed.
        """
        adapters = cls()
        for path in _folders(folder):
            shown = path.name[:64].encode("ascii", "backslashreplace").decode()
            try:
                if len(adapters) == MAX_ADAPTERS:
                    raise ModelError(f"there are {MAX_ADAPTERS} adapters already")
                adapters.by_name[path.name] = load(path, architecture, base_digest)
            except ModelError as error:
                adapters.left_out[shown] = error.message
        return adapters

    def __getitem__(self, name: str) -> LoraAdapter:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)


class _Config(msgspec.Struct, frozen=True):
    """What is read of ``adapter_config.json``."""

    peft_type: str
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    base_model_digest: str | None = None


_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",  # the tensors say what is in
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "eva_config",
    }
)
_UNDERSTOOD = _WITHOUT_EFFECT | set(_Config.__struct_fields__)
_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base model's weights as they are (PiSSA, for one, does not)."""


def load(path: Path, architecture: Architecture, base_digest: str | None = None) -> LoraAdapter:
    """The adapter in the folder ``path``. Raises ``ModelError`` with the reason."""
    if not _NAME.fullmatch(path.name):
        raise ModelError("its name is none: use letters, digits, '.', '_' and '-'")
    config = _config(path)
    if config.base_model_digest not in (None, base_digest or config.base_model_digest):
        raise ModelError("it was made for another model (base_model_digest differs)")
    _check_size(path)
    weights = Checkpoint(path, WEIGHTS)
    return LoraAdapter(path.name, _layers(weights, config, architecture))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ModelError(f"the adapters' folder cannot be read: {error.strerror}") from None


def _config(path: Path) -> _Config:
    try:
        with (path / CONFIG).open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise ModelError(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")
        given = msgspec.json.decode(raw, type=dict[str, Any])
        config = msgspec.convert(given, _Config)
    except OSError as error:
        raise ModelError(f"{CONFIG} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, RecursionError, msgspec.MsgspecError) as error:
        raise ModelError(f"{CONFIG} cannot be used: {error}") from None
    _check_understood(given, config)
    return config


def _check_understood(given: Mapping[str, Any], config: _Config) -> None:
    if config.peft_type != "LORA":
        raise ModelError(f"it is of the kind {config.peft_type[:32]!r}, not LORA")
    if config.bias != "none":
        raise ModelError("it trains biases")
    if config.fan_in_fan_out:
        raise ModelError("its matrices are stored the other way round (fan_in_fan_out)")
    if config.init_lora_weights not in _KEEPS_THE_BASE:
        raise ModelError(f"it changes the base model ({str(config.init_lora_weights)[:32]!r})")
    for key, value in given.items():
        if value and key not in _UNDERSTOOD:
            raise ModelError(f"it uses {key[:64]!r}, which is not supported")
    for key in (*(config.rank_pattern or ()), *(config.alpha_pattern or ())):
        if not _PATTERN.fullmatch(key):
            raise ModelError(f"the pattern {key[:64]!r} is not the end of a module's name")


def _check_size(path: Path) -> None:
    file = path / WEIGHTS
    if not file.is_file():
        raise ModelError(f"it has no {WEIGHTS}; other formats are not read")
    if file.stat().st_size > MAX_BYTES:
        raise ModelError(f"{WEIGHTS} is larger than {MAX_BYTES} bytes")


def _layers(
    weights: Checkpoint, config: _Config, architecture: Architecture
) -> tuple[dict[str, LoraPair], ...]:
    layers: tuple[dict[str, LoraPair], ...] = tuple({} for _ in range(architecture.n_layers))
    found = _modules(weights.names, architecture)
    if not found:
        raise ModelError("it adds nothing to this model")
    for (layer, module), names in sorted(found.items()):
        layers[layer][module] = _pair(weights, names, _Place(layer, module), config, architecture)
    return layers


def _modules(names: list[str], architecture: Architecture) -> dict[tuple[int, str], dict[str, str]]:
    """The tensors' names by layer, module and side (``A``, ``B``)."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for name in names:
        match = _TENSOR.fullmatch(name)
        known = match is not None and match[3] in architecture.projections
        if match is None or not known or match[2] != module_path(match[3]):
            raise ModelError(f"it has the tensor {name[:128]!r}, which is not understood")
        layer = int(match[1])
        if layer >= architecture.n_layers:
            raise ModelError(f"it has a layer {layer}, the model only {architecture.n_layers}")
        found.setdefault((layer, match[3]), {})[match[4]] = name
    return found


@dataclass(frozen=True)
class _Place:
    layer: int
    module: str

    @property
    def path(self) -> str:
        """As PEFT's patterns know it."""
        return f"model.layers.{self.layer}.{module_path(self.module)}"

    def of(self, pattern: Mapping[str, Any] | None, default: Any) -> Any:
        """The first entry whose key is this path's end (from a dot on), as PEFT chooses;
        a key that starts with ``^`` is the whole path."""
        for key, value in (pattern or {}).items():
            if self.path == key.removeprefix("^") or self.path.endswith("." + key):
                return value
        return default


def _pair(
    weights: Checkpoint,
    names: Mapping[str, str],
    place: _Place,
    config: _Config,
    architecture: Architecture,
) -> LoraPair:
    if names.keys() != {"A", "B"}:
        raise ModelError(f"{place.path} has only one of its two matrices")
    d_out, d_in = architecture.projections[place.module]
    rank = place.of(config.rank_pattern, config.r)
    alpha = place.of(config.alpha_pattern, config.lora_alpha)
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    inner = weights.get(names["A"], (rank, d_in))
    with np.errstate(over="ignore"):  # found right below
        outer = weights.get(names["B"], (d_out, rank)) * np.float32(scale)
    if not (np.isfinite(inner).all() and np.isfinite(outer).all()):
        raise ModelError(f"{place.path} holds values that are not finite")
    return LoraPair(inner, outer)
