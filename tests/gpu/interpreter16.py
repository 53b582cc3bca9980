"""Patches that make Triton's interpreter right for bfloat16, and faster; conftest.py installs them if kernels are
interpreted.

The interpreter stores a bfloat16 as a uint16 of its bits, and its arithmetic treats them as integers: it multiplies the
bits (triton#11584), adds them, and converts float64 and integers to an integer. A conversion from float32 truncates
where a GPU rounds. float16 is numpy's, whose arithmetic and conversions are right.

With the patches an operation on bfloat16 operands computes in float32, which holds them exactly, and rounds a bfloat16
result to nearest, ties to even: one rounding of the exact result for +, -, *, / and sqrt, since float32 has more than
twice the bits. A dot accumulates in its accumulator's dtype, as a GPU does. Conversions of float64 round once.

A comparison of scalars stays a bool where it is repeated for a block. The interpreter makes it an integer, which it
refuses as a mask from Triton 3.9 on.

Loads, stores, selections and bitcasts only move the bits and are not patched. Reductions and atomic operations in 16
bits raise: no kernel uses them, and one that did would accumulate in 16 bits on a GPU, but in more here.

Half of the interpreter's time goes into three things. It replaces the functions of triton.language again for every
function that a kernel calls, and searches all of them for that; here a kernel replaces them once per module that it
calls into. It makes a table of dtypes for every number; here each dtype is looked up once. It checks integers for
overflow by ten operations of its own; here numpy does.
"""

import contextlib
import operator

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16, as bits in uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """Round numbers of any dtype to the nearest bfloat16, ties to even, as bits in uint16. NaN is 0x7FFF, as on a GPU.

    Numbers that float32 cannot hold exactly are first rounded to odd (the last bit is set), so that they stay on the
    right side of every tie.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.asarray(x).astype(np.float32)
    bits = near.view(np.uint32)
    if x.dtype.kind != "f" or x.dtype.itemsize > 4:
        exact = x.astype(np.float64)
        bits = (bits - (np.abs(near) > np.abs(exact))) | (near != exact)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(near), 0x7FFF, rounded).astype(np.uint16)


def _is_bfloat16(x) -> bool:
    # A comparison's result keeps the dtype of its operands; its data are bool.
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _widened(x):
    return TensorHandle(widen(x.data), tl.float32) if _is_bfloat16(x) else x


def _in_float32(original):
    """Wrap a builder operation whose result has the dtype of its last tensor (for a dot, the accumulator)."""

    def operation(self, *arguments, **options):
        result = original(self, *map(_widened, arguments), **options)
        last = [x for x in arguments if isinstance(x, TensorHandle)][-1]
        if _is_bfloat16(last) and result.data.dtype == np.float32:
            return TensorHandle(narrow(result.data), tl.bfloat16)
        return result

    return operation


def _cast(original):
    def cast_impl(self, src, dst_type):
        src = _widened(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(narrow(src.data), tl.bfloat16)
        with np.errstate(over="ignore", invalid="ignore"):  # to float16: infinity, as on a GPU
            return original(self, src, dst_type)

    return cast_impl


def _to_bfloat16_or_float16(original):
    """Wrap create_fp_to_fp, which is called only for an explicit rounding mode or float8."""

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            raise NotImplementedError("a conversion of bfloat16 other than to nearest even")
        return original(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _refused_atomic(original):
    def create_atomic_rmw(self, op, ptr, val, *arguments):
        if val.dtype.scalar in (tl.bfloat16, tl.float16):
            raise NotImplementedError("atomic operations in 16 bits")
        return original(self, op, ptr, val, *arguments)

    return create_atomic_rmw


def _refused_reduction(original):
    def check_tensor(self, operands):
        if any(x.dtype.scalar in (tl.bfloat16, tl.float16) for x in operands):
            raise NotImplementedError("reductions and scans in 16 bits")
        original(self, operands)

    return check_tensor


def _splat_of_bool(original):
    def create_splat(self, ret_ty, arg):
        if arg.data.dtype != np.bool_:
            return original(self, ret_ty, arg)
        return TensorHandle(np.full(ret_ty.shape, arg.data), tl.int1)

    return create_splat


def _get_bf16(self, value):
    return TensorHandle(narrow(np.array([value], np.float64)), tl.bfloat16)


_replaced: set[str] = set()
"""The modules for whose functions the running kernel has replaced those of triton.language."""


def _run_kernel(original):
    def call(self, *arguments, **options):
        _replaced.clear()
        return original(self, *arguments, **options)

    return call


def _replace_once(original):
    def patch_lang(function):
        if function.__module__ not in _replaced:
            _replaced.add(function.__module__)
            return original(function)  # the interpreter undoes what the kernel itself asked for, the first one

    return patch_lang


def _by_name(original):
    known = {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name  # a block's is that of its numbers
        if name not in known:
            known[name] = original(dtype)
        return known[name]

    return get_np_dtype


def _overflow_by_numpy(original):
    def check(self, left, right, operation):
        scalar = left.type.scalar
        if scalar.int_bitwidth < 64:
            exact = getattr(operator, operation.__name__)(*(x.handle.data.astype(np.int64) for x in (left, right)))
            fits = scalar.get_int_min_value() <= exact.min() and exact.max() <= scalar.get_int_max_value()
            assert fits, f"{scalar} overflows in {operation.__name__}"

    return check


_REPLACED = [(InterpreterBuilder, name, _in_float32) for name in ("binary_op", "unary_op", "ternary_op", "create_fma")]
_REPLACED += [(InterpreterBuilder, name, _in_float32) for name in ("create_rsqrt", "create_dot")]
_REPLACED += [
    (InterpreterBuilder, "cast_impl", _cast),
    (InterpreterBuilder, "create_fp_to_fp", _to_bfloat16_or_float16),
    (InterpreterBuilder, "create_splat", _splat_of_bool),
    (InterpreterBuilder, "create_atomic_rmw", _refused_atomic),
    (InterpreterBuilder, "get_bf16", lambda original: _get_bf16),  # Triton's builder has none
    (ReduceScanOpInterface, "check_tensor", _refused_reduction),
    (TritonSemantic, "binary_op_sanitize_overflow_impl", _overflow_by_numpy),
    (GridExecutor, "__call__", _run_kernel),
    (interpreter, "_patch_lang", _replace_once),
    (interpreter, "_get_np_dtype", _by_name),
]
_originals: list = []


def install():
    """Install the patches, once per process."""
    for owner, name, replacement in _REPLACED if not _originals else ():
        original = owner.__dict__.get(name)
        _originals.append((owner, name, original))
        setattr(owner, name, replacement(original))
    assert isinstance(interpreter.interpreter_builder, InterpreterBuilder)


def remove():
    while _originals:
        owner, name, original = _originals.pop()
        delattr(owner, name) if original is None else setattr(owner, name, original)


@contextlib.contextmanager
def without():
    """Remove the patches within the context."""
    remove()
    try:
        yield
    finally:
        install()
