"""A checkpoint that somebody found, whatever it is kept in, tensor by tensor.

    suspect = open_suspect(Path("leaked-Q4_K_M.gguf"))
    suspect.get("model.layers.0.mlp.up_proj.weight")     # float32, None where it has none

Safetensors (a file, or a folder in Hugging Face's layout), GGUF in any quantisation that the
``gguf`` package reads, and a LoRA adapter to be merged first. Names are brought to the layout's,
whatever prefix a trainer left on them. Pickles are not read.

Not protected here: GGUF is parsed by the ``gguf`` package. Trace files of strangers on a machine
that holds nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fortpoint.errors import ModelError
from fortpoint.vault.tensor_file import TensorFile

Floats = NDArray[np.float32]

_BODY = re.compile(r"(?:.*\.)?(layers\.\d+\..+|embed_tokens\.weight|norm\.weight)")
_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_SHARDS = 2048


class Suspect(Protocol):
    name: str

    def get(self, tensor: str) -> Floats | None:
        """Float32 in the base's layout, an array of its own; None where there is none."""
        ...


def open_suspect(path: Path, adapter: Path | None = None) -> Suspect:
    """Raises ``ModelError`` for what is neither safetensors nor GGUF."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        suspect: Suspect = _Safetensors(path.name, [f for f in files if f.name != _ADAPTER])
    elif path.suffix == ".gguf":
        suspect = _Gguf(path)
    else:
        suspect = _Safetensors(path.name, [path])
    return suspect if adapter is None else _Merged(suspect, adapter)


class _Safetensors:
    def __init__(self, name: str, files: list[Path]) -> None:
        if not 0 < len(files) <= _MAX_SHARDS:
            raise ModelError(f"{name} holds no safetensors; give a file, a folder or a .gguf")
        self.name = name
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for path in files:
            file = TensorFile(path)
            self._places |= {_base_name(tensor): (file, tensor) for tensor in file.names}

    def get(self, tensor: str) -> Floats | None:
        if tensor not in self._places:
            return None
        file, name = self._places[tensor]
        return file.get(name, file.shape(name))


class _Gguf:
    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        from fortpoint.vault.gguf_file import checkpoint_name

        self.name = path.name
        try:
            reader = GGUFReader(path)
            architecture = reader.fields["general.architecture"].contents()
            heads = reader.fields[f"{architecture}.attention.head_count"].contents()
            kv_heads = reader.fields.get(f"{architecture}.attention.head_count_kv")
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise ModelError(f"{path.name} is not a GGUF file that can be read: {error}") from None
        n_kv_heads = heads if kv_heads is None else kv_heads.contents()
        interleaved = architecture == "llama"
        self._heads = {"attn_q": heads, "attn_k": n_kv_heads} if interleaved else {}
        self._tensors: dict[str, tuple[Any, str]] = {}
        for tensor in reader.tensors:
            try:
                name, kind = checkpoint_name(tensor.name)
            except ModelError:  # rotary frequencies and the like carry no mark
                continue
            self._tensors[name] = (tensor, kind)

    def get(self, tensor: str) -> Floats | None:
        from gguf.quants import dequantize

        from fortpoint.vault.gguf_file import deinterleave

        if tensor not in self._tensors:
            return None
        packed, kind = self._tensors[tensor]
        try:
            weight = np.array(dequantize(packed.data, packed.tensor_type), np.float32)
        except (ValueError, NotImplementedError):
            raise ModelError(f"{packed.name} has a quantisation that gguf does not read") from None
        if kind in self._heads:
            weight = np.ascontiguousarray(deinterleave(weight, self._heads[kind]))
        return weight


class _AdapterConfig(msgspec.Struct, frozen=True):
    r: int
    lora_alpha: float
    use_rslora: bool = False


class _Merged:
    """A suspect with a LoRA adapter in PEFT's format added to it."""

    def __init__(self, suspect: Suspect, adapter: Path) -> None:
        self.name = f"{suspect.name} with {adapter.name}"
        self._suspect = suspect
        try:
            with (adapter / _ADAPTER_CONFIG).open("rb") as file:
                config = msgspec.json.decode(file.read(_MAX_CONFIG_BYTES), type=_AdapterConfig)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ModelError(f"{adapter.name} has no {_ADAPTER_CONFIG} that can be read") from None
        if config.r < 1:
            raise ModelError(f"{_ADAPTER_CONFIG} has the rank {config.r}, which is none")
        self._scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        self._file = TensorFile(adapter / _ADAPTER)
        self._names = {_base_name(name): name for name in self._file.names}

    def get(self, tensor: str) -> Floats | None:
        weight = self._suspect.get(tensor)
        stem = tensor.removesuffix("weight")
        down, up = (self._factor(f"{stem}lora_{side}") for side in "AB")
        if weight is None or down is None or up is None:
            return weight
        if up.shape[1:] != down.shape[:1] or (len(up), *down.shape[1:]) != weight.shape:
            raise ModelError(f"the adapter's factors do not fit {tensor}")
        weight += np.float32(self._scale) * (up @ down)
        return weight

    def _factor(self, stem: str) -> Floats | None:
        for name in (f"{stem}.weight", f"{stem}.default.weight"):
            if name in self._names:
                return self._file.get(self._names[name], self._file.shape(self._names[name]))
        return None


def _base_name(name: str) -> str:
    """``base_model.model.model.layers.0.x`` is ``model.layers.0.x``."""
    match = _BODY.fullmatch(name.replace(".base_layer.", "."))
    return f"model.{match[1]}" if match else name
