"""models/attention.py against a naive NumPy attention that repeats the key heads, as the reference does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.models.attention import attend, make_cache_mask, make_causal_mask

RNG = np.random.default_rng(1)


def naive_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
    """float64, one row, head and query at a time."""
    batch, queries, heads, head_dim = q.shape
    k = np.repeat(
        k, heads // k.shape[2], axis=2
    )  # repeat_kv: key head 0 for the first query heads, and so on
    v = np.repeat(v, heads // v.shape[2], axis=2)
    out = np.zeros(q.shape)
    for b in range(batch):
        for n in range(heads):
            for s in range(queries):
                keep = np.ones(k.shape[1], bool) if mask is None else mask[b, s]
                scores = (k[b, keep, n].astype(np.float64) @ q[b, s, n]) / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[b, s, n] = weights / weights.sum() @ v[b, keep, n]
    return out


def run(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    mask = None if mask is None else jnp.asarray(mask)
    compiled = jax.jit(attend)
    return np.asarray(compiled(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask=mask))


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32) * 2


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_the_naive_form(heads: int, kv_heads: int, masked: bool) -> None:
    q, k, v = draw(2, 5, heads, 4), draw(2, 7, kv_heads, 4), draw(2, 7, kv_heads, 4)
    mask = RNG.random((2, 5, 7)) < 0.5 if masked else None
    if mask is not None:
        mask[:, :, 0] = True  # every query sees something
    found = run(q, k, v, mask)
    np.testing.assert_allclose(found, naive_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)


def test_what_is_masked_changes_nothing() -> None:
    q, k, v = draw(1, 3, 4, 8), draw(1, 6, 2, 8), draw(1, 6, 2, 8)
    mask = (np.arange(6) < 4)[None, None].repeat(3, axis=1)
    before = run(q, k, v, mask)
    k[:, 4:], v[:, 4:] = 1e4, -1e4
    np.testing.assert_array_equal(run(q, k, v, mask), before)


def test_a_query_that_sees_nothing_gets_the_mean_and_no_nan() -> None:
    q, k, v = draw(1, 2, 2, 4), draw(1, 3, 2, 4), draw(1, 3, 2, 4)
    mask = np.array([[[False, False, False], [True, False, False]]])
    found = run(q, k, v, mask)
    np.testing.assert_allclose(found[0, 0], v[0].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0, 1], v[0, 0], rtol=1e-6)


def test_the_softmax_is_reduced_in_float32() -> None:
    # 4096 equal weights: a sum in bfloat16 stops growing at 256.
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    k = jnp.zeros((1, 4096, 1, 4), jnp.bfloat16)
    v = jnp.ones((1, 4096, 1, 4), jnp.bfloat16)
    found = attend(q, k, v, mask=None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), 1.0, rtol=0.01)


def test_the_causal_mask_shows_the_past_and_no_padding() -> None:
    attention_mask = jnp.asarray([[True, True, True, False], [False, True, True, True]])
    mask = np.asarray(make_causal_mask(attention_mask)).astype(int)
    np.testing.assert_array_equal(mask[0], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(mask[1], [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]])


def test_the_cache_mask_shows_the_slots_up_to_the_position() -> None:
    mask = make_cache_mask(jnp.asarray([[0, 1], [3, 4]]), 5)
    np.testing.assert_array_equal(np.asarray(mask).sum(-1), [[1, 2], [4, 5]])
    np.testing.assert_array_equal(mask[1, 0], [True, True, True, True, False])


@pytest.mark.parametrize("heads", [2, 6])
def test_scales_are_those_of_the_keys_and_values_of_their_place(heads: int) -> None:
    q, k, v = draw(2, 3, heads, 4), draw(2, 5, 2, 4), draw(2, 5, 2, 4)
    rng = np.random.default_rng(2)
    k_scale, v_scale = (rng.uniform(0.1, 3, (2, 2, 5)).astype(np.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((2, 3, 5)) < 0.7).at[..., 0].set(True)

    def spread(scale: np.ndarray) -> np.ndarray:
        return scale.transpose(0, 2, 1)[..., None]

    scaled = (jnp.asarray(a) for a in (q, k * spread(k_scale), v * spread(v_scale)))
    expected = attend(*scaled, mask=mask)
    found = attend(
        *(jnp.asarray(a) for a in (q, k, v)),
        mask=mask,
        k_scale=jnp.asarray(k_scale),
        v_scale=jnp.asarray(v_scale),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
