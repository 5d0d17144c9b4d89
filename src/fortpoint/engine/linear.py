"""A weight matrix, stored in the way that multiplies fastest on this machine.

Which kernel is fastest depends on the processor and on the number of rows: one row waits for
memory, so four-bit weights win; many rows wait for arithmetic, so the widest units win. A
``Plan`` (measured by ``precision.py``) therefore names one kernel for few rows and one for
many. Torch carries all of them:

    float32, bfloat16   oneDNN with weights packed once
    int8                ``_weight_int8pack_mm``: a scale for each output
    int4                ``_weight_int4pack_mm_for_cpu``: scale and minimum for 32 inputs

Both integer kernels take and give bfloat16 and accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KernelName = Literal["float32", "bfloat16", "int8", "int4"]
Product = Callable[[Tensor], Tensor]

INT4_GROUP = 32
_INT4_OUTPUTS = 16  # the packed layout wants a multiple of this
_INT4_INNER_K_TILES = 8

_pack = torch.ops.mkldnn._reorder_linear_weight
_packed = torch.ops.mkldnn._linear_pointwise.default
_int8 = torch.ops.aten._weight_int8pack_mm.default
_int4 = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_to_int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default


@dataclass(frozen=True)
class Plan:
    """``few`` multiplies up to ``few_rows`` rows, ``many`` the rest.

    ``dtype`` is what goes in and comes out. ``rounded`` is the integer grid that the weights
    are put on first, if any: both kernels then hold the same values.
    """

    dtype: torch.dtype
    many: KernelName
    few: KernelName
    few_rows: int
    rounded: Literal["int8", "int4"] | None = None

    @property
    def name(self) -> str:
        """As shown to the operator: ``int4 to 6 rows, then bfloat16``."""
        if self.few == self.many:
            return self.many
        return f"{self.few} to {self.few_rows} rows, then {self.many}"


class Matrix:
    """``y = x W^T + b`` for ``W`` ``[d_out, d_in]``."""

    def __init__(self, weight: Tensor, plan: Plan, bias: Tensor | None = None) -> None:
        weight = weight.float()
        self._bias = None if bias is None else bias.to(plan.dtype)
        self._few_rows = plan.few_rows
        if plan.rounded == "int4" and fits_int4(weight):
            weight = from_int4(*to_int4(weight))
        elif plan.rounded == "int8":
            levels, scales = to_int8(weight)
            weight = levels.float() * scales.float()[:, None]
        self._many = kernel(plan.many, weight, plan.dtype)
        same = plan.few == plan.many or (plan.few == "int4" and not fits_int4(weight))
        self._few = self._many if same else kernel(plan.few, weight, plan.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` is ``[n, d_in]`` in the plan's dtype."""
        y = self._few(x) if len(x) <= self._few_rows else self._many(x)
        return y if self._bias is None else y.add_(self._bias)


def kernel(name: KernelName, weight: Tensor, dtype: torch.dtype) -> Product:
    """The product with ``weight`` ``[d_out, d_in]`` (float32) for inputs of ``dtype``."""
    made = _KERNELS[name](weight)
    wants = torch.float32 if name == "float32" else torch.bfloat16
    if wants == dtype:
        return made
    return lambda x: made(x.to(wants)).to(dtype)


def _float32(weight: Tensor) -> Product:
    packed = _pack(weight)
    return lambda x: _packed(x, packed, None, "none", [], "")


def _bfloat16(weight: Tensor) -> Product:
    packed = _pack(weight.bfloat16())
    return lambda x: _packed(x, packed, None, "none", [], "")


def _int8_kernel(weight: Tensor) -> Product:
    levels, scales = to_int8(weight)
    return lambda x: _int8(x, levels, scales)


def _int4_kernel(weight: Tensor) -> Product:
    levels, scales, minima = to_int4(weight)
    packed = _to_int4(levels.int(), _INT4_INNER_K_TILES)
    # The kernel computes (level - 8) * scale + zero.
    zeros = minima.float() + 8 * scales.float()
    both = torch.stack([scales.float(), zeros], dim=-1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: _int4(x, packed, INT4_GROUP, both)


_KERNELS: dict[KernelName, Callable[[Tensor], Product]] = {
    "float32": _float32,
    "bfloat16": _bfloat16,
    "int8": _int8_kernel,
    "int4": _int4_kernel,
}


def fits_int4(weight: Tensor) -> bool:
    """The packed layout exists for this shape."""
    d_out, d_in = weight.shape
    return d_in % INT4_GROUP == 0 and d_out % _INT4_OUTPUTS == 0


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric levels ``[d_out, d_in]`` and a bfloat16 scale for each output."""
    scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).bfloat16()
    levels = torch.round(weight / scales.float()[:, None]).clamp(-127, 127).to(torch.int8)
    return levels, scales


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 to 15 ``[d_out, d_in]``; scale and minimum ``[d_out, d_in / 32]`` (float16).

    Weights that came from llama.cpp's Q4_1 get their own levels back: its groups, too, run
    from their minimum to their maximum in 15 steps.
    """
    d_out, d_in = weight.shape
    groups = weight.view(d_out, d_in // INT4_GROUP, INT4_GROUP)
    minima, maxima = groups.amin(-1).half(), groups.amax(-1)
    scales = ((maxima - minima.float()) / 15).clamp_min(1e-7).half()
    levels = torch.round((groups - minima.float()[..., None]) / scales.float()[..., None])
    return levels.clamp_(0, 15).to(torch.uint8).view(d_out, d_in), scales, minima


def from_int4(levels: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """The weights ``[d_out, d_in]`` that these levels stand for, in float32."""
    d_out, n_groups = scales.shape
    groups = levels.view(d_out, n_groups, INT4_GROUP).float()
    return (groups * scales.float()[..., None] + minima.float()[..., None]).view(d_out, -1)


def int4_error(weight: Tensor) -> float:
    """Relative error (root mean square) of putting ``weight`` on the four-bit grid."""
    error = from_int4(*to_int4(weight.float())) - weight.float()
    return float(error.norm() / weight.float().norm().clamp_min(1e-12))
