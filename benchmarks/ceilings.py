"""Timing calls on a device, and what the device can do at most. Not for: what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def time_calls(call: Callable[[], Any], *, calls: int, repeats: int) -> float:
    """Seconds of one call, when so many are dispatched one after the other: the median of `repeats`."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def matmul_flop_per_s(size: int, dtype: Any, *, repeats: int) -> float:
    """What the device reaches in a square matmul of `size` rows and columns: the peak that can be had."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    multiply = jax.jit(lambda a, b: (a @ b).astype(a.dtype))
    return 2 * size**3 / time_calls(lambda: multiply(a, b), calls=10, repeats=repeats)
