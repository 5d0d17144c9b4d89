"""What numba lacks: vectors of sixteen, bytes multiplied in fours, bits, atomic counters.

Functions with a ``builder`` write LLVM IR while a kernel is compiled; the others are called
in kernels. Everything here is exact or rounds as IEEE 754 says, so that two machines with
different instructions compute the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, Literal

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

LANES = 16
"""Numbers that a kernel computes side by side; outputs come in tiles of so many."""

Instructions = Literal["avx512vnni", "avx2", "any"]

FLOAT, HALF = ir.FloatType(), ir.HalfType()
BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOATS, HALFS = ir.VectorType(FLOAT, LANES), ir.VectorType(HALF, LANES)
INTS, SHORTS = ir.VectorType(INT, LANES), ir.VectorType(SHORT, LANES)
BYTES = ir.VectorType(BYTE, 4 * LANES)

FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be taken in another order: one that depends on their length alone."""


intrinsic: Any = extending.intrinsic  # what it makes has no types that mypy knows

_OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}


def jit(**options: Any) -> Any:
    """``numba.njit`` as all kernels want it: no lock, no checks that raise."""
    return numba.njit(nogil=True, **_OPTIONS, **options)


def native(n_arguments: int, **options: Any) -> Callable[[Any], int]:
    """Compile a function of so many int64 on its own; gives its address, for ``call``.

    What is called by address is not compiled again into each of its callers: the whole program
    takes a fourth of the time.
    """

    def compile_(function: Any) -> int:
        signature = types.void(*[types.int64] * n_arguments)
        made: Any = numba.cfunc(signature, **_OPTIONS, **options)(function)
        _kept.append(made)
        return int(made.address)

    return compile_


_kept: list[Any] = []  # compiled code lives as long as the process


def _call(n_arguments: int) -> tuple[Any, Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [LONG] * n_arguments)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (n_arguments + 1)), codegen


@intrinsic
def call3(typingctx: Any, address: Any, a: Any, b: Any, c: Any) -> Any:
    """Call the native function at ``address``."""
    return _call(3)


@intrinsic
def call6(typingctx: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    return _call(6)


@intrinsic
def call10(
    typingctx: Any, address: Any,
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any,
) -> Any:  # fmt: skip
    return _call(10)


@functools.cache
def instructions() -> Instructions:
    """The best this processor has of what the kernels know."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512vnni") and features.get("avx512bw"):
        return "avx512vnni"
    return "avx2" if features.get("avx2") else "any"


# --- while compiling ----------------------------------------------------------------------


def long(value: int) -> ir.Constant:
    return ir.Constant(LONG, value)


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """The same number in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def operation(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """An LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once."""
    return operation(builder, "llvm.fma.v16f32", FLOATS, a, b, c)


def pointer(builder: Any, address: Any, kind: ir.Type, offset: Any = None) -> Any:
    """An address as a pointer to ``kind``; ``offset`` counts in ``kind``s."""
    made = builder.inttoptr(address, kind.as_pointer())
    return made if offset is None else builder.gep(made, [offset])


def load(builder: Any, base: Any, vector: ir.Type) -> Any:
    """A vector that begins at ``base``, aligned or not."""
    return builder.load(builder.bitcast(base, vector.as_pointer()), align=1)


def store(builder: Any, value: Any, base: Any) -> None:
    builder.store(value, builder.bitcast(base, value.type.as_pointer()), align=1)


def spread(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    """One number in every lane."""
    empty = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(INT, 0))
    return _pick(builder, first, empty, [0] * vector.count)


def widen(builder: Any, halves: Any) -> Any:
    """Sixteen bfloat16 (as 16-bit integers) to float32."""
    return builder.bitcast(builder.shl(builder.zext(halves, INTS), constant(INTS, 16)), FLOATS)


def exp(builder: Any, x: Any) -> Any:
    """e^x in each lane to 2 units in the last place (Cephes); 0 below -87, e^88 above 88."""

    def number(value: float) -> Any:
        return constant(FLOATS, value)

    def clamp(which: str, a: Any, limit: float) -> Any:
        return operation(builder, f"llvm.{which}num.v16f32", FLOATS, a, number(limit))

    inside = clamp("max", clamp("min", x, 88.0), -87.0)
    shifted = fma(builder, inside, number(1.44269504), number(0.5))
    n = operation(builder, "llvm.floor.v16f32", FLOATS, shifted)
    r = fma(builder, n, number(-0.693359375), inside)
    r = fma(builder, n, number(2.12194440e-4), r)
    p = number(1.9875691500e-4)
    for coefficient in (
        *(1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    ):
        p = fma(builder, p, r, number(coefficient))
    p = builder.fadd(fma(builder, p, builder.fmul(r, r), r), number(1.0))
    exponent = builder.add(builder.fptosi(n, INTS), constant(INTS, 127))
    power = builder.bitcast(builder.shl(exponent, constant(INTS, 23)), FLOATS)
    tiny = builder.fcmp_ordered("<", x, number(-87.0))
    return builder.select(tiny, number(0.0), builder.fmul(p, power))


def dot_bytes(builder: Any, which: Instructions, total: Any, levels: Any, x: Any, most: int) -> Any:
    """``total + levels . x`` in each lane: four unsigned bytes (up to ``most``) by four signed.

    ``total`` is sixteen int32; ``levels`` and ``x`` are 64 bytes. Exact.
    """
    if which == "avx512vnni":
        return operation(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, total, levels, x)
    if which == "any":
        return builder.add(total, _dot_anywhere(builder, levels, x))
    halves = [
        _dot_avx2(builder, _half(builder, levels, i), _half(builder, x, i), most) for i in (0, 1)
    ]
    return builder.add(total, _pick(builder, halves[0], halves[1], list(range(LANES))))


def _dot_avx2(builder: Any, levels: Any, x: Any, most: int) -> Any:
    """Eight lanes. Pairs of products fit 16 bits for small levels only."""
    shorts, ints = ir.VectorType(SHORT, 16), ir.VectorType(INT, 8)
    multiply = functools.partial(operation, builder, "llvm.x86.avx2.pmadd.wd", ints)
    if 2 * most * 128 < 2**15:
        pairs = operation(builder, "llvm.x86.avx2.pmadd.ub.sw", shorts, levels, x)
        return multiply(pairs, constant(shorts, 1))
    levels, x = builder.bitcast(levels, shorts), builder.bitcast(x, shorts)
    eight = constant(shorts, 8)
    even = multiply(
        builder.and_(levels, constant(shorts, 255)), builder.ashr(builder.shl(x, eight), eight)
    )
    return builder.add(even, multiply(builder.lshr(levels, eight), builder.ashr(x, eight)))


def _dot_anywhere(builder: Any, levels: Any, x: Any) -> Any:
    wide = ir.VectorType(INT, 4 * LANES)
    products = builder.mul(builder.zext(levels, wide), builder.sext(x, wide))
    quarters = [_pick(builder, products, products, list(range(i, 4 * LANES, 4))) for i in range(4)]
    return builder.add(builder.add(quarters[0], quarters[1]), builder.add(quarters[2], quarters[3]))


def _half(builder: Any, vector: Any, which: int) -> Any:
    n = vector.type.count // 2
    return _pick(builder, vector, vector, list(range(which * n, which * n + n)))


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(INT, len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


# --- in kernels ---------------------------------------------------------------------------


@intrinsic
def number(typingctx: Any, address: Any, index: Any) -> Any:
    """The ``index``-th int64 at ``address``."""
    return _get(LONG, types.int64, index)


@intrinsic
def real(typingctx: Any, address: Any, index: Any) -> Any:
    """The ``index``-th float32 at ``address``."""
    return _get(FLOAT, types.float32, index)


@intrinsic
def whole(typingctx: Any, address: Any, index: Any) -> Any:
    """The ``index``-th int32 at ``address``."""
    return _get(INT, types.int32, index)


@intrinsic
def halfword(typingctx: Any, address: Any, index: Any) -> Any:
    """The ``index``-th 16-bit number at ``address``: a bfloat16 or float16, as its bits."""
    return _get(SHORT, types.uint16, index)


@intrinsic
def byte(typingctx: Any, address: Any, index: Any) -> Any:
    return _get(BYTE, types.uint8, index)


@intrinsic
def set_real(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    return _set(FLOAT, types.float32, index)


@intrinsic
def set_int(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    return _set(INT, types.int32, index)


@intrinsic
def set_halfword(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    return _set(SHORT, types.uint16, index)


@intrinsic
def set_byte(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    return _set(BYTE, types.int8, index)


def _get(kind: ir.Type, result: Any, index: Any) -> tuple[Any, Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], kind, args[1]))

    return result(types.int64, _whole(index)), codegen


def _set(kind: ir.Type, value: Any, index: Any) -> tuple[Any, Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], pointer(builder, args[0], kind, args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, _whole(index), value), codegen


def _whole(index: Any) -> Any:
    """A member of an IntEnum is one already."""
    return index if isinstance(index, types.IntEnumMember) else types.int64


@intrinsic
def bits_as_float(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.uint32), codegen


@intrinsic
def float_as_bits(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], INT)

    return types.uint32(types.float32), codegen


@intrinsic
def half_as_float(typingctx: Any, bits: Any) -> Any:
    """float16 (as its bits) to float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], HALF), FLOAT)

    return types.float32(types.uint16), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at ``address``; returns what was there. Orders memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], LONG), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def fetch(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address``, and all that was written before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], LONG), "acquire", align=8)

    return types.int64(types.int64), codegen


@intrinsic
def put(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], pointer(builder, args[0], LONG), "release", align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the processor that this is a loop that waits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if instructions() != "any":
            operation(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


give_way = types.ExternalFunction("sched_yield", types.int32())
"""Let another thread have this core (POSIX)."""


@jit(inline="always")
def wide(half: Any) -> Any:
    """bfloat16 to float32."""
    return bits_as_float(np.uint32(np.uint32(half) << np.uint32(16)))


@jit(inline="always")
def narrow(value: Any) -> Any:
    """float32 to bfloat16, to the nearest even; NaN stays NaN."""
    bits = float_as_bits(np.float32(value))
    lowest = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + lowest) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(quiet if is_nan else rounded)


ctypes.CDLL(None)  # the C library's symbols, for ``give_way``
