"""The fast copies and counts give what NumPy gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from convert.arrays import contiguous, count_not_finite

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (129, 300), (256, 128)])
def test_a_transpose_becomes_contiguous_bit_for_bit(dtype: type, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    copy = contiguous(x.T)
    assert copy.flags.c_contiguous
    assert copy.dtype == x.dtype
    np.testing.assert_array_equal(copy, x.T)


def test_what_is_contiguous_already_is_not_copied() -> None:
    x = np.ones((200, 300), np.float32)
    assert contiguous(x) is x
    np.testing.assert_array_equal(contiguous(x[::2, ::3]), x[::2, ::3])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_nan_and_both_infinities_are_counted(dtype: type) -> None:
    largest = ml_dtypes.finfo(dtype).max
    x = np.array([[np.nan, 1, -np.inf], [np.inf, largest, -largest]], np.float64).astype(dtype)
    assert count_not_finite(x) == 3
    assert count_not_finite(x[:, 1]) == 0
    assert count_not_finite(np.asarray(np.nan, dtype)) == 1


def test_whole_numbers_are_finite() -> None:
    assert count_not_finite(np.arange(5)) == 0
