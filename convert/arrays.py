"""Two array operations that NumPy is slow at for the dtypes of weights: a transposed copy, and counting NaN.

For: the rule engine, which does both to every tensor of a 26 GB model. Not for: what tensors mean.

NumPy copies a transposed view element by element across the whole matrix, and treats bfloat16 (`ml_dtypes`, a dtype of
its own) by a function call per element. Both are done here on unsigned integers of the same width, a block at a time.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BLOCK = 128  # rows of a block: with 2-byte numbers, a block of 128 x 128 and its copy lie in the first-level cache
_CHUNK = 1 << 22  # numbers that are looked at in one go

_EXPONENT = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
"""Bits that are all set in what is infinite or not a number (IEEE 754; bfloat16 has float32's exponent)."""


def contiguous(x: Array) -> Array:
    """`np.ascontiguousarray`, faster for the transpose of a matrix."""
    if (
        x.ndim != 2
        or not x.flags.f_contiguous
        or x.flags.c_contiguous
        or x.dtype.itemsize not in (2, 4)
    ):
        return np.ascontiguousarray(x)
    bits = np.dtype(f"u{x.dtype.itemsize}")
    source = x.T.view(bits)
    copy = np.empty(x.shape, bits)
    for first in range(0, source.shape[0], _BLOCK):
        rows = source[first : first + _BLOCK]
        for column in range(0, source.shape[1], _BLOCK):
            copy[column : column + _BLOCK, first : first + _BLOCK] = rows[
                :, column : column + _BLOCK
            ].T
    return copy.view(x.dtype)


def count_not_finite(x: Array) -> int:
    """How many numbers of `x` are NaN or infinite. None are in an array of whole numbers."""
    flat = x.reshape(-1)
    exponent = _EXPONENT.get(x.dtype)
    bad = 0
    for first in range(0, flat.size, _CHUNK):
        chunk = flat[first : first + _CHUNK]
        if exponent is None:
            bad += chunk.size - int(np.count_nonzero(np.isfinite(chunk)))
        else:
            bad += int(np.count_nonzero((chunk.view(np.uint16) & exponent) == exponent))
    return bad
