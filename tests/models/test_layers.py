"""models/layers.py against NumPy in float64: norms, the dense layer, and the stack of repeated blocks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.models.layers import Dense, LayerNorm, RMSNorm, run_blocks

RNG = np.random.default_rng(0)
WIDTH = 24
# A mean far from zero and an eps that is a tenth of the variance: the two things that norms are told apart by.
X = (RNG.normal(size=(3, 5, WIDTH)) + 2.0).astype(np.float32)
EPS = 0.1
SCALE, BIAS = RNG.normal(size=(2, WIDTH)).astype(np.float32)


def apply(module: nn.Module, params: dict[str, Any], x: Any) -> np.ndarray:
    return np.asarray(jax.jit(module.apply)({"params": params}, jnp.asarray(x)))


def test_rms_norm_equals_the_definition() -> None:
    wide = X.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * SCALE
    found = apply(RMSNorm(EPS, jnp.float32), {"scale": SCALE}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_equals_the_definition() -> None:
    wide = X.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * SCALE + BIAS
    found = apply(LayerNorm(EPS, jnp.float32), {"scale": SCALE, "bias": BIAS}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_reduce_in_float32_whatever_comes_in(norm: Any) -> None:
    # 300 squared overflows float16; a mean over bfloat16 keeps three digits. One rounding at the end is all there is.
    x = (X * 300).astype(np.float16)
    params = {"scale": np.ones(WIDTH, np.float32)}
    if norm is LayerNorm:
        params["bias"] = np.zeros(WIDTH, np.float32)
    narrow = apply(norm(EPS, jnp.float16), params, x)
    wide = apply(norm(EPS, jnp.float32), params, x.astype(np.float32))
    assert narrow.dtype == np.float16
    np.testing.assert_array_equal(narrow, wide.astype(np.float16))


def test_rms_norm_rounds_before_the_scale_as_the_original_does() -> None:
    x, scale = X.astype(jnp.bfloat16), SCALE.astype(jnp.bfloat16)
    wide = x.astype(np.float32)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(EPS))
    expected = normed.astype(jnp.bfloat16) * scale
    found = apply(RMSNorm(EPS, jnp.bfloat16), {"scale": scale}, jnp.asarray(x))
    # Equal up to values that lie on a rounding boundary: one bfloat16 step (2**-8), at few places.
    differs = found != expected
    assert differs.mean() < 0.02
    np.testing.assert_allclose(
        found.astype(np.float32), expected.astype(np.float32), rtol=2**-7, atol=0
    )


def test_dense_multiplies_with_an_in_out_kernel() -> None:
    kernel = RNG.normal(size=(WIDTH, 7)).astype(np.float32)
    bias = RNG.normal(size=7).astype(np.float32)
    expected = X.astype(np.float64) @ kernel
    plain = apply(Dense(7, False, jnp.float32), {"kernel": kernel}, X)
    biased = apply(Dense(7, True, jnp.float32), {"kernel": kernel, "bias": bias}, X)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(biased, expected + bias, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """A block whose answer depends on the order of the blocks."""

    extra: float

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, shift: jax.Array) -> tuple[jax.Array, Any]:
        weight = self.param("weight", nn.initializers.ones, ())
        return x * weight + shift + self.extra, None if cache is None else cache + 1


class Tower(nn.Module):
    stacked: bool

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array, caches: Any = None) -> Any:
        return run_blocks(
            Twice, 3, name="blocks", stacked=self.stacked, block_args={"extra": 0.5}, x=x, caches=caches, args=(shift,)
        )  # fmt: skip


WEIGHTS = np.array([2.0, 3.0, 5.0], np.float32)


@pytest.mark.parametrize("stacked", [False, True])
def test_blocks_run_in_order_and_every_state_is_given(stacked: bool) -> None:
    one_by_one = {str(i): {"weight": weight} for i, weight in enumerate(WEIGHTS)}
    params = {"blocks": {"weight": WEIGHTS} if stacked else one_by_one}
    x, caches, states = Tower(stacked).apply({"params": params}, jnp.ones(2), jnp.ones(()))
    # 1 -> 2 * 1 + 1.5 -> 3 * 3.5 + 1.5 -> 5 * 12 + 1.5
    np.testing.assert_array_equal(np.asarray(states)[:, 0], [3.5, 12.0, 61.5])
    np.testing.assert_array_equal(x, [61.5, 61.5])
    assert caches is None


def test_each_block_gets_its_own_cache_and_returns_it() -> None:
    params = {"blocks": {str(i): {"weight": weight} for i, weight in enumerate(WEIGHTS)}}
    _, caches, _ = Tower(False).apply({"params": params}, jnp.ones(2), jnp.ones(()), (10, 20, 30))
    assert caches == (11, 21, 31)


def test_a_stack_with_a_cache_is_refused_with_the_way_out() -> None:
    params = {"blocks": {"weight": WEIGHTS}}
    with pytest.raises(ValueError, match=r"no KV cache.*DECODE"):
        Tower(True).apply({"params": params}, jnp.ones(2), jnp.ones(()), (10, 20, 30))
