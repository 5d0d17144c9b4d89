"""All numbers of a decoder of the Llama family, read from a ``config.json`` nobody vouches for.

    config = read_config(folder)
    if (reason := lacking(config)) is None:
        architecture = Architecture.of(config)

The family is Llama, Mistral, Qwen2 and Qwen3: RMS norms before attention and MLP, rotary
embedding of whole heads, grouped keys, a gated MLP with SiLU. They differ in biases (Qwen2),
norms of queries and keys (Qwen3) and sliding windows; ``lacking`` names what else a file asks
for. Both spellings of transformers 4 and 5 are read, and what is absent has transformers'
defaults. Every number has a range, and none is believed before ``checkpoint.py`` has found the
weights to be of these shapes.

Not protected here: memory. A configuration within its ranges may still ask for more than the
machine has; then loading fails in the sandboxed process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from fortpoint.engine import rotary
from fortpoint.errors import ModelError

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
MAX_CONFIG_BYTES = 1024 * 1024
LANES = 16
"""Numbers that the compiled pass computes at once: sizes are whole multiples."""

_FOREIGN = (
    "quantization_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "attention_multiplier",
    "logits_scaling",
    "residual_multiplier",
)
"""Keys that change the computation; a member of the family has none of them."""

Shape = tuple[int, ...]


class _Config(msgspec.Struct, frozen=True):
    """The fields of ``config.json`` that the forward pass needs, each with its range."""

    model_type: str
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 22)]
    hidden_size: Annotated[int, Meta(ge=LANES, le=1 << 16)]
    intermediate_size: Annotated[int, Meta(ge=LANES, le=1 << 19)]
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1024)]
    num_attention_heads: Annotated[int, Meta(ge=1, le=1024)]
    max_position_embeddings: Annotated[int, Meta(ge=1, le=1 << 25)]
    num_key_value_heads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    head_dim: Annotated[int, Meta(ge=LANES, le=512)] | None = None
    rms_norm_eps: Annotated[float, Meta(gt=0, le=0.1)] = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Annotated[int, Meta(ge=1, le=1 << 25)] | None = 4096
    max_window_layers: Annotated[int, Meta(ge=0, le=1 << 16)] = 28
    layer_types: Annotated[list[str], Meta(max_length=1024)] | None = None


@dataclass(frozen=True, eq=False)
class Architecture:
    """``windows`` has each layer's sliding window in tokens, the row itself included; 0 for
    none. Attention's scores are multiplied by ``score_scale``, rotary cosines and sines by
    ``rotary_scale``. ``tied``: the embedding is the output matrix too."""

    model_type: str
    vocab_size: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    inv_freq: NDArray[np.float32]  # [head_dim / 2]
    rotary_scale: float

    @classmethod
    def load(cls, folder: Path) -> Architecture:
        """Of the model in ``folder``. Raises ``ModelError`` with what the fast path lacks."""
        config = read_config(folder)
        if reason := lacking(config):
            raise ModelError(reason)
        return cls.of(config)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Architecture:
        """From a configuration that lacks nothing. Raises ``ModelError``."""
        c = _converted(config)
        n_kv_heads, head_dim = _heads(c, config)
        found = rotary.Rotary.of(_rope(config), head_dim, c.max_position_embeddings)
        return cls(
            model_type=c.model_type,
            vocab_size=c.vocab_size,
            d_model=c.hidden_size,
            d_mlp=c.intermediate_size,
            n_layers=c.num_hidden_layers,
            n_heads=c.num_attention_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            max_positions=c.max_position_embeddings,
            norm_eps=c.rms_norm_eps,
            tied=c.tie_word_embeddings,
            qkv_bias=_has_bias(c) or c.model_type == "qwen2",
            out_bias=_has_bias(c),
            qk_norm=c.model_type == "qwen3",
            windows=_windows(c),
            inv_freq=found.inv_freq,
            rotary_scale=found.scale,
        )

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.n_heads // self.n_kv_heads

    @property
    def score_scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Each matrix of a block by its module's name: ``(d_out, d_in)``."""
        d_heads, d_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "q_proj": (d_heads, self.d_model),
            "k_proj": (d_kv, self.d_model),
            "v_proj": (d_kv, self.d_model),
            "o_proj": (self.d_model, d_heads),
            "gate_proj": (self.d_mlp, self.d_model),
            "up_proj": (self.d_mlp, self.d_model),
            "down_proj": (self.d_model, self.d_mlp),
        }

    def shapes(self) -> dict[str, Shape]:
        """Every tensor of the checkpoint by its name."""
        wanted: dict[str, Shape] = {
            "model.embed_tokens.weight": (self.vocab_size, self.d_model),
            "model.norm.weight": (self.d_model,),
        }
        if not self.tied:
            wanted["lm_head.weight"] = (self.vocab_size, self.d_model)
        for layer in range(self.n_layers):
            wanted |= {
                f"model.layers.{layer}.{name}": shape for name, shape in self._block().items()
            }
        return wanted

    def _block(self) -> dict[str, Shape]:
        wanted: dict[str, Shape] = {
            "input_layernorm.weight": (self.d_model,),
            "post_attention_layernorm.weight": (self.d_model,),
        }
        for name, shape in self.projections.items():
            wanted[f"{module_path(name)}.weight"] = shape
        if self.qk_norm:
            wanted |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        biased = [*(("q_proj", "k_proj", "v_proj") if self.qkv_bias else ())]
        biased += ["o_proj"] if self.out_bias else []
        return wanted | {
            f"{module_path(name)}.bias": (self.projections[name][0],) for name in biased
        }


def module_path(name: str) -> str:
    """Where a block keeps a projection: ``q_proj`` is ``self_attn.q_proj``."""
    return f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it is. Raises ``ModelError`` when it is absent, huge or no object."""
    try:
        with (folder / "config.json").open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"config.json of the model cannot be read: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ModelError(f"config.json of the model is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"config.json of the model is no JSON object: {error}") from None


def lacking(config: Mapping[str, Any]) -> str | None:
    """What the fast path lacks for this model, in words; None where it lacks nothing."""
    return next(_lacks(config), None)


def _lacks(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("model_type") not in FAMILY:
        yield f"architecture {_shown(config.get('model_type'))} is not of the Llama family"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"its activation is {_shown(config['hidden_act'])}, not 'silu'"
    if config.get("mlp_bias"):
        yield "its MLP has biases"
    for key in _FOREIGN:
        if config.get(key) is not None:
            yield f"it uses {key}"
    rope = _rope(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "only a part of each head is rotated"
    if rope["rope_type"] not in rotary.KINDS:
        yield f"its rotary embedding is of the kind {_shown(rope['rope_type'])}"
    for key, size in _sizes(config).items():
        if size % LANES:
            yield f"its {key} is {size}, no multiple of {LANES}"


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Those that must be whole multiples; what is not even a number is found later."""
    sizes = {key: config.get(key) for key in ("hidden_size", "intermediate_size", "head_dim")}
    known = {key: size for key, size in sizes.items() if isinstance(size, int)}
    d_model, n_heads = known.get("hidden_size", 0), config.get("num_attention_heads")
    derived = sizes["head_dim"] is None and config["model_type"] != "qwen3"
    if derived and isinstance(n_heads, int) and n_heads > 0:
        known["head_dim"] = d_model // n_heads
    return known


def _shown(value: object) -> str:
    return repr(value)[:64]


def _converted(config: Mapping[str, Any]) -> _Config:
    try:
        return msgspec.convert(config, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"config.json of the model cannot be used: {error}") from None


def _heads(c: _Config, config: Mapping[str, Any]) -> tuple[int, int]:
    """Key heads, and the size of a head."""
    if "num_key_value_heads" not in config and c.model_type != "llama":
        raise ModelError("config.json of the model lacks num_key_value_heads")
    n_kv_heads = c.num_key_value_heads or c.num_attention_heads
    if c.num_attention_heads % n_kv_heads:
        raise ModelError("config.json: num_attention_heads is no multiple of num_key_value_heads")
    if c.head_dim is not None:
        return n_kv_heads, c.head_dim
    if c.model_type == "qwen3":
        return n_kv_heads, 128
    if c.hidden_size % c.num_attention_heads:
        raise ModelError("config.json: hidden_size is no multiple of num_attention_heads")
    return n_kv_heads, c.hidden_size // c.num_attention_heads


def _has_bias(c: _Config) -> bool:
    """Of all four projections of attention; only these two families have the switch."""
    return c.attention_bias and c.model_type in ("llama", "qwen3")


def _windows(c: _Config) -> tuple[int, ...]:
    if c.model_type == "mistral":
        return (c.sliding_window or 0,) * c.num_hidden_layers
    if c.model_type == "llama":
        return (0,) * c.num_hidden_layers
    window = (c.sliding_window or 0) if c.use_sliding_window else 0
    if c.layer_types is None:
        return tuple(
            window if layer >= c.max_window_layers else 0 for layer in range(c.num_hidden_layers)
        )
    known = {"full_attention": 0, "sliding_attention": window}
    if len(c.layer_types) != c.num_hidden_layers or not set(c.layer_types) <= known.keys():
        raise ModelError("config.json: layer_types does not name each layer's attention")
    if not window and "sliding_attention" in c.layer_types:
        raise ModelError("config.json: layer_types asks for a sliding window that is not given")
    return tuple(known[kind] for kind in c.layer_types)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in transformers 5's spelling, whichever the file has."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ModelError("config.json: the rotary embedding's parameters are no object")
    merged = {
        key: config[key]
        for key in ("rope_theta", "partial_rotary_factor")
        if config.get(key) is not None
    } | given
    if config.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    merged["rope_type"] = given.get("rope_type", given.get("type", "default"))
    return merged
