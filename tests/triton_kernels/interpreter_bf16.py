"""bfloat16 for Triton's CPU interpreter, which keeps it as the integers of its bits and computes with those.

Loads, stores and moves of the bits are right as they are; casts and `tl.dot` are repaired here. Anything else that
would compute in bfloat16 is refused: our kernels widen what they load and narrow what they store or multiply.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

Method = Callable[..., Any]


def install() -> None:
    """Repair the interpreter of this process."""
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(InterpreterBuilder, name, _refuse_bf16(getattr(InterpreterBuilder, name)))
    for owner in (ReduceOps, ScanOps):
        owner.apply_impl = _refuse_bf16(owner.apply_impl)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to the float32 of the same value."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, rounded to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(operand: Any) -> bool:
    return getattr(getattr(operand, "dtype", None), "scalar", None) == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _cast(method: Method) -> Method:
    def cast(self: InterpreterBuilder, source: TensorHandle, target: Any, *rest: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16:
            bits = source.data if _is_bf16(source) else narrow(source.data.astype(np.float32))
            return TensorHandle(bits, tl.bfloat16)
        if not _is_bf16(source):
            return method(self, source, target, *rest)
        wide = _widened(source)
        return wide if target.scalar == tl.float32 else method(self, wide, target, *rest)

    return cast


def _dot(method: Method) -> Method:
    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return method(self, _widened(a), _widened(b), *rest)

    return dot


def _refuse_bf16(method: Method) -> Method:
    def refusing(self: Any, *operands: Any) -> Any:
        for operand in operands:
            if any(map(_is_bf16, operand if isinstance(operand, tuple) else (operand,))):
                raise TypeError("a kernel computes in bfloat16: widen to float32 after the load")
        return method(self, *operands)

    return refusing
