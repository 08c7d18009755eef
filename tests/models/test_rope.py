"""models/rope.py against the complex-number form of RoFormer in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.models import rope

RNG = np.random.default_rng(2)
rotate = jax.jit(rope.rotate, static_argnames="base")


def rotate_complex(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Each pair `(x[i], x[i + H/2])` is one complex number, turned by `position / base ** (2i/H)`."""
    half = x.shape[-1] // 2
    pairs = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    angles = positions[:, :, None] * base ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = pairs * np.exp(1j * angles)[:, :, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


# float32 angles are off by position * 2**-24: 1e-5 at 100, and with it the tolerance grows.
@pytest.mark.parametrize(("start", "atol"), [(0, 1e-6), (65, 5e-5), (2000, 1e-3)])
@pytest.mark.parametrize("base", [10000.0, 100000.0])
def test_rotation_equals_the_complex_form(start: int, atol: float, base: float) -> None:
    length = 1 if start == 0 else 40
    x = RNG.normal(size=(2, length, 3, 64)).astype(np.float32)
    positions = start + np.arange(length)[None] + np.array([[0], [7 if start else 0]])
    found = rotate(jnp.asarray(x), jnp.asarray(positions, jnp.int32), base=base)
    np.testing.assert_allclose(found, rotate_complex(x, positions, base), rtol=0, atol=atol)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = RNG.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(at: int, other: int) -> float:
        left = rotate(jnp.asarray(q), jnp.asarray([[at]]), base=10000.0)
        right = rotate(jnp.asarray(k), jnp.asarray([[other]]), base=10000.0)
        return float(jnp.sum(left * right))

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(3, 5), abs=1e-2)


def test_angles_stay_float32_for_narrow_inputs() -> None:
    # Position 1001 does not exist in bfloat16 (it would be 1000), so a narrow angle would be off by a radian.
    x = jnp.asarray(RNG.normal(size=(1, 1, 1, 8)), jnp.bfloat16)
    positions = jnp.asarray([[1001]])
    found = rotate(x, positions, base=10000.0)
    assert found.dtype == jnp.bfloat16
    expected = rotate_complex(np.asarray(x, np.float32), np.asarray(positions), 10000.0)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-7, atol=1e-3)
