"""models/int8.py: what is rounded to what, and that NaN and infinity are never rounded away."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.models.int8 import Int8Dense, Int8Embed, quantise


def test_each_output_channel_is_rounded_by_its_own_largest_value() -> None:
    kernel = np.asarray([[12.7, 0.0, -1.0], [-6.35, 0.0, 0.26], [0.06, 0.0, 0.0]], np.float32)
    values, scale = quantise(kernel, 0)
    assert values.dtype == np.int8
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale, [0.1, 1, 1 / 127], rtol=1e-6)
    # -6.35 / 0.1 lies at half: to the even one, or what float32 makes of it
    np.testing.assert_array_equal(values[:, 1:], [[0, -127], [0, 33], [0, 0]])
    assert values[0, 0] == 127
    assert values[1, 0] in (-63, -64)
    assert values[2, 0] == 1
    np.testing.assert_array_equal(quantise(kernel.T, 1)[0], values.T)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy says so as well
def test_a_channel_that_is_not_finite_still_shows_it(bad: float) -> None:
    kernel = np.ones((4, 3), np.float32)
    kernel[2, 1] = bad
    for array in (kernel, jnp.asarray(kernel)):
        values, scale = quantise(array, 0)
        product = np.asarray(values[0], np.float32) * np.asarray(scale)
        np.testing.assert_array_equal(np.isfinite(scale), [True, False, True])
        np.testing.assert_array_equal(np.isfinite(product), [True, False, True])


def test_modules_multiply_with_the_rounded_values_and_scale_each_channel_once() -> None:
    rng = np.random.default_rng(8)
    kernel = rng.normal(size=(6, 5)).astype(np.float32) * np.float32(10) ** np.arange(-2, 3)
    x = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)
    values, scale = quantise(kernel, 0)
    expected = np.asarray(x, np.float64) @ (values * scale.astype(np.float64))
    dense = {"kernel": jnp.asarray(values), "kernel_scale": jnp.asarray(scale)}
    embed = {"embedding": jnp.asarray(values.T), "embedding_scale": jnp.asarray(scale)}
    for dtype, rtol in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        found = Int8Dense(5, dtype).apply({"params": dense}, x)
        head = Int8Embed(5, 6, dtype).apply({"params": embed}, x, method="attend")
        for y in (found, head):
            assert y.dtype == dtype
            size = np.abs(expected).max((0, 1))  # of each channel: they span four decades
            assert (np.abs(np.asarray(y, np.float64) - expected) <= rtol * size).all()
        rows = Int8Embed(5, 6, dtype).apply({"params": embed}, jnp.asarray([[4, 0]]))
        assert rows.dtype == dtype
        np.testing.assert_array_equal(
            rows[0], jnp.asarray((values * scale).T[[4, 0]]).astype(dtype)
        )
