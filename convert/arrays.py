"""Two array operations that NumPy is slow at for the dtypes of weights: a transposed copy, and counting NaN.

For: the rule engine, which does both to every tensor of a 26 GB model. Not for: what tensors mean.

NumPy copies a transposed view element by element across the whole matrix (0.2 GB/s on two cores), and treats bfloat16
(`ml_dtypes`, a dtype of its own) by a function call per element. JAX's transfer to its CPU device transposes in blocks
(1 GB/s and more); NaN are counted on the bits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_CHUNK = 1 << 22  # numbers that are looked at in one go

_EXPONENT = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
"""Bits that are all set in what is infinite or not a number (IEEE 754; bfloat16 has float32's exponent)."""


def contiguous(x: Array) -> Array:
    """`np.ascontiguousarray`, faster for the transpose of a matrix."""
    cpu = _cpu()
    transposed = x.ndim == 2 and x.flags.f_contiguous and not x.flags.c_contiguous
    if not transposed or cpu is None or x.dtype.itemsize not in (2, 4):  # JAX makes 8 bytes into 4
        return np.ascontiguousarray(x)
    bits = x.T.view(f"u{x.dtype.itemsize}").T
    return np.asarray(jax.device_put(bits, cpu)).view(x.dtype)


@functools.cache
def _cpu() -> jax.Device | None:
    """None where JAX was told to leave the CPU alone (`JAX_PLATFORMS=cuda`); NumPy then does it, slowly."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


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
