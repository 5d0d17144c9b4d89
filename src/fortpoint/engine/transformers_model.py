"""Every decoder that the fast path lacks, computed by ``transformers``: a ``Model``.

    model = TransformersModel.load(folder, "auto", max_context=4096, kv_bytes=192 << 20, threads=2)
    result = model.forward(Step(tokens, spans, logit_rows=[0], tap_layers=(3,)))

It is slow and general. Each span is a call of its own, so neighbours cannot matter. Hooks on
the decoder's layers read and change the residual stream. What the architectures call their
parts is not known here: one trial token at loading finds the layers, the final norm, what a
token's keys and values take, and that the model can be computed at all.

Code comes from the installed ``transformers`` alone, weights from safetensors alone; a tensor
that is missing refuses the model, which transformers would make up. Prefixes are not shared,
and adapters are not taken.

Not protected here: the parsing of ``config.json`` by transformers. It runs in the sandboxed
process, without network and with the model's folder as the only foreign thing to read.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fortpoint.engine.architecture import read_config
from fortpoint.engine.model import Floats, Result, Span, Step
from fortpoint.errors import ModelError

if TYPE_CHECKING:
    from transformers import DynamicCache

    from fortpoint.engine.steering import Edits

MAX_LAYERS = 1024
MAX_D_MODEL = 1 << 16

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class TransformersModel:
    """Weights and the forward pass. One thread calls it."""

    def __init__(self, module: Any, max_context: int, kv_bytes: int) -> None:
        self._module = module
        self._config = module.config
        self._layers = _layers(module, self._config.get_text_config().num_hidden_layers)
        self._few_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
        self._pass: _Pass | None = None
        for i, layer in enumerate(self._layers):
            layer.register_forward_hook(self._hook(i))
        trial = _Trial.run(self)
        self._final_norm = trial.final_norm
        self.d_model, self.vocab_size = trial.d_model, trial.vocab_size
        self._budget = _Budget(kv_bytes // trial.kv_bytes_per_token)
        known = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        self.max_context = min(max_context, known or max_context, self._budget.n_tokens)

    @classmethod
    def load(
        cls, folder: Path, dtype: str, max_context: int, kv_bytes: int, threads: int
    ) -> TransformersModel:
        """``dtype`` is configuration's ``engine.dtype``. Raises ``ModelError``."""
        config = read_config(folder)
        _check(config)
        kind = _dtype(dtype, config)
        torch.set_num_threads(threads)
        try:
            return cls(_module(folder, kind), max_context, kv_bytes)
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign model does to the library
            raise ModelError(
                f"transformers cannot load the model: {type(error).__name__}: {str(error)[:500]}"
            ) from None

    @property
    def architecture(self) -> str:
        return str(self._config.model_type)

    @property
    def precision(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self._module.parameters()).dtype
        return dtype

    def new_cache(self) -> TransformersCache:
        return TransformersCache(self._config, self._budget)

    def close(self) -> None:
        """There are no threads of its own."""

    @torch.inference_mode()
    def normed(self, x: Floats) -> Floats:
        """See ``Model.normed``."""
        if self._final_norm is None:
            return x.copy()
        normed = self._final_norm(torch.from_numpy(x).to(self._dtype))
        return _floats(normed)

    @torch.inference_mode()
    def forward(self, step: Step) -> Result:
        """See ``Model.forward``."""
        n_rows = len(step.tokens)
        last = self.n_layers - 1 if step.last_layer is None else step.last_layer
        result = Result(
            residual=np.empty((n_rows, self.d_model), np.float32),
            logits=np.empty((len(step.logit_rows), self.vocab_size), np.float32),
            seen={i: np.empty((n_rows, self.d_model), np.float32) for i in step.tap_layers},
        )
        for span in step.spans:
            cache = _own(span)
            part = _Pass(last, step.last_layer is not None, span, step.edits, result)
            wanted = [row for row in step.logit_rows if span.start <= row < span.end]
            logits = self._run(
                step.tokens[span.start : span.end],
                cache.past,
                [row - span.start for row in wanted],
                part,
            )
            if logits is not None:
                places = [i for i, row in enumerate(step.logit_rows) if row in set(wanted)]
                result.logits[places] = _floats(logits)
            cache.length += span.end - span.start
        return result

    def _run(
        self, tokens: Sequence[int], past: DynamicCache, rows: Sequence[int], part: _Pass
    ) -> Tensor | None:
        """One sequence's logits ``[len(rows), vocab_size]``; None when stopped before them."""
        arguments: dict[str, Any] = {"past_key_values": past, "use_cache": True}
        keep = torch.tensor(rows, dtype=torch.long)
        if self._few_logits:
            arguments["logits_to_keep"] = keep
        self._pass = part
        try:
            logits: Tensor = self._module(torch.tensor([list(tokens)]), **arguments).logits[0]
        except _Enough:
            return None
        finally:
            self._pass = None
        return logits if self._few_logits else logits[keep]

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
            if self._pass is None:
                return None
            is_tuple = isinstance(output, tuple)
            changed = self._pass.see(layer, output[0] if is_tuple else output)
            if changed is None:
                return None
            return (changed, *output[1:]) if is_tuple else changed

        return hook


class TransformersCache:
    """Keys and values of one sequence. ``reserve`` only counts: memory is taken as it fills."""

    def __init__(self, config: Any, budget: _Budget) -> None:
        self._config = config
        self._budget = budget
        self._reserved = 0
        self.length = 0
        self.past = _empty(config)

    def reserve(self, n_tokens: int) -> bool:
        """See ``Cache.reserve``."""
        more = max(n_tokens - self._reserved, 0)
        if more > self._budget.free:
            return False
        self._budget.free -= more
        self._reserved += more
        return True

    @torch.inference_mode()
    def fork(self) -> TransformersCache | None:
        """A whole copy."""
        fork = TransformersCache(self._config, self._budget)
        if not fork.reserve(self.length):
            return None
        fork.past, fork.length = copy.deepcopy(self.past), self.length
        return fork

    def release(self) -> None:
        self._budget.free += self._reserved
        self._reserved = self.length = 0
        self.past = _empty(self._config)

    def adopt(self, tokens: Sequence[int], salt: str) -> Floats | None:
        """Nothing is ever published."""
        return None

    def publish(self, tokens: Sequence[int], salt: str, rows: Floats) -> None:
        """Does nothing."""


class _Budget:
    """Tokens of all caches together."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = self.free = n_tokens


class _Enough(Exception):
    """The last layer that was wanted is computed."""


@dataclass(frozen=True)
class _Pass:
    """What to do with the residual stream of one span on its way through the layers."""

    last: int
    stops: bool
    span: Span
    edits: Edits | None
    result: Result

    def see(self, layer: int, x: Tensor) -> Tensor | None:
        """``x`` ``[1, n, d_model]`` after block ``layer``; a changed copy, or None."""
        changed = None
        rows = _floats(x[0])
        if self.edits is not None:
            rows = np.array(rows)
            self.edits.apply(layer, rows, self.span.start)
            changed = torch.from_numpy(rows)[None].to(x.dtype)
        place = slice(self.span.start, self.span.end)
        if layer in self.result.seen:
            self.result.seen[layer][place] = rows
        if layer == self.last:
            self.result.residual[place] = rows
            if self.stops:
                raise _Enough
        return changed


@dataclass
class _Trial:
    """What one token's way through the model shows of it."""

    n_layers: int
    outputs: dict[int, Tensor] = field(default_factory=dict)
    final_norm: nn.Module | None = None
    vocab_size: int = 0
    kv_bytes_per_token: int = 0

    @property
    def d_model(self) -> int:
        return int(self.outputs[0].shape[-1])

    @classmethod
    @torch.inference_mode()
    def run(cls, model: TransformersModel) -> _Trial:
        trial, past = cls(model.n_layers), _empty(model._config)
        handles = [
            layer.register_forward_hook(trial._saw(i)) for i, layer in enumerate(model._layers)
        ]
        handles += [
            module.register_forward_pre_hook(trial._saw_input)
            for module in _parent(model._module, model._layers).children()
            if module is not model._layers
        ]
        try:
            output = model._module(torch.tensor([[0]]), past_key_values=past, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        trial.vocab_size = int(output.logits.shape[-1])
        trial._check(past)
        return trial

    def _saw(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            self.outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _saw_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0] is self.outputs.get(self.n_layers - 1):
            self.final_norm = module

    def _check(self, past: DynamicCache) -> None:
        shapes = {tuple(output.shape) for output in self.outputs.values()}
        if len(self.outputs) != self.n_layers or len(shapes) != 1 or len(min(shapes)) != 3:
            raise ModelError("the model's layers do not pass on one residual stream")
        kept = [
            tensor
            for layer in getattr(past, "layers", ())
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(tensor, Tensor)
        ]
        if past.get_seq_length() != 1 or len(kept) != 2 * self.n_layers:
            raise ModelError("the model does not keep keys and values for each of its layers")
        self.kv_bytes_per_token = sum(tensor.nbytes for tensor in kept)


def _module(folder: Path, dtype: torch.dtype) -> Any:
    """The model, every weight of it from the folder."""
    import transformers

    library: Any = transformers  # its annotations are partial
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    _check_sizes(library.AutoConfig.from_pretrained(folder, **_LOCAL))
    module, report = library.AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        dtype=dtype,
        # The plainest: others drop what an architecture asks for (soft caps), and the file
        # could name one to be fetched.
        attn_implementation="eager",
        output_loading_info=True,
        **_LOCAL,
    )
    wrong = sorted({*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])})
    if wrong or report.get("error_msgs"):
        raise ModelError(f"the weights lack {(wrong or ['a tensor'])[0][:200]}")
    return module.eval()


def _check_sizes(config: Any) -> None:
    if config.is_encoder_decoder:
        raise ModelError(f"architecture {config.model_type!r} is no decoder")
    text = config.get_text_config()
    n_layers, d_model = text.num_hidden_layers, text.hidden_size
    if not (0 < n_layers <= MAX_LAYERS and 0 < d_model <= MAX_D_MODEL):
        raise ModelError(f"a model of {n_layers} layers of {d_model} is out of bounds")


def _check(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config") is not None:
        raise ModelError("quantised checkpoints are not read; give the model in bfloat16")
    if config.get("auto_map") is not None:
        raise ModelError("the model brings code of its own, which is never run")


def _dtype(wanted: str, config: Mapping[str, Any]) -> torch.dtype:
    """``auto`` keeps bfloat16 and computes all else in float32."""
    if wanted == "auto":
        given = config.get("dtype") or config.get("torch_dtype")
        return torch.bfloat16 if given == "bfloat16" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if wanted not in known:
        raise ModelError(
            f"engine.dtype {wanted!r} is for models of the Llama family; "
            "this one computes in float32 or bfloat16"
        )
    return known[wanted]


def _layers(module: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder's: the largest list that has one module for each layer."""
    lists = [
        found
        for found in module.modules()
        if isinstance(found, nn.ModuleList) and len(found) == n_layers
    ]
    if not lists:
        raise ModelError("the model's layers are not where they can be found")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _parent(module: nn.Module, child: nn.Module) -> nn.Module:
    return next(found for found in module.modules() if child in found.children())


def _empty(config: Any) -> DynamicCache:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _floats(x: Tensor) -> Floats:
    return x.float().numpy()


def _own(span: Span) -> TransformersCache:
    if span.adapter is not None:
        raise TypeError("this model takes no adapters")
    if not isinstance(span.cache, TransformersCache):
        raise TypeError("this cache belongs to another model")
    if span.cache.past.get_seq_length() != span.cache.length:
        raise RuntimeError("this sequence failed before: a part of a step is in its cache")
    return span.cache
