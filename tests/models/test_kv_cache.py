"""models/kv_cache.py: prompts go to the slots from 0, single tokens to the slot of their position."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.kv_cache import LayerCache, init_cache

KV_HEADS, HEAD_DIM = 2, 3


def empty(batch: int, slots: int) -> LayerCache:
    blank = jnp.full((batch, KV_HEADS, slots, HEAD_DIM), -1.0)
    return LayerCache(k=blank, v=blank)


def draw(*lead: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(*lead, KV_HEADS, HEAD_DIM)).astype(np.float32)


def test_a_prompt_fills_the_first_slots() -> None:
    k, v = draw(2, 4), draw(2, 4) + 1
    cache = empty(2, 6).update(
        jnp.asarray(k), jnp.asarray(v), jnp.broadcast_to(jnp.arange(4)[None], (2, 4))
    )
    assert cache.capacity == 6
    found_k, found_v = cache.read(2, 6)
    np.testing.assert_array_equal(found_k[:, :4], k)
    np.testing.assert_array_equal(found_v[:, :4], v)
    np.testing.assert_array_equal(found_k[:, 4:], -1.0)


def test_only_the_first_slots_are_read() -> None:
    cache = empty(2, 6).update(
        jnp.asarray(draw(2, 6)),
        jnp.asarray(draw(2, 6)),
        jnp.broadcast_to(jnp.arange(6)[None], (2, 6)),
    )
    for whole, part in zip(cache.read(2, 6), cache.read(2, 3), strict=True):
        assert part.shape == (2, 3, KV_HEADS, HEAD_DIM)
        np.testing.assert_array_equal(part, whole[:, :3])


def test_single_tokens_go_to_their_rows_own_slots() -> None:
    k, v = draw(2, 1), draw(2, 1) + 1
    cache = empty(2, 6).update(jnp.asarray(k), jnp.asarray(v), jnp.asarray([[5], [2]]))
    expected = np.full((2, 6, KV_HEADS, HEAD_DIM), -1.0, np.float32)
    expected[0, 5], expected[1, 2] = k[0, 0], k[1, 0]
    np.testing.assert_array_equal(cache.read(2, 6)[0], expected)
    expected[0, 5], expected[1, 2] = v[0, 0], v[1, 0]
    np.testing.assert_array_equal(cache.read(2, 6)[1], expected)


def test_a_stretch_goes_to_the_places_from_its_first_position_on() -> None:
    k, v = draw(1, 3), draw(1, 3) + 1
    cache = empty(2, 6).update(jnp.asarray(k), jnp.asarray(v), jnp.asarray([[2, 3, 4]]))
    for found, given in zip(cache.read(2, 6), (k, v), strict=True):
        expected = np.full((2, 6, KV_HEADS, HEAD_DIM), -1.0, np.float32)
        expected[0, 2:5] = given[0]
        np.testing.assert_array_equal(found, expected)


def test_rows_behind_those_given_are_neither_written_nor_read() -> None:
    cache = empty(3, 6).update(
        jnp.asarray(draw(2, 1)), jnp.asarray(draw(2, 1)), jnp.asarray([[5], [2]])
    )
    for whole, part in zip(cache.read(3, 6), cache.read(2, 6), strict=True):
        np.testing.assert_array_equal(whole[2], np.full((6, KV_HEADS, HEAD_DIM), -1.0))
        np.testing.assert_array_equal(part, whole[:2])


def test_a_cache_keeps_its_own_dtype() -> None:
    cache = LayerCache(
        k=jnp.zeros((1, KV_HEADS, 4, HEAD_DIM), jnp.bfloat16),
        v=jnp.zeros((1, KV_HEADS, 4, HEAD_DIM), jnp.bfloat16),
    )
    after = cache.update(jnp.asarray(draw(1, 1)), jnp.asarray(draw(1, 1)), jnp.asarray([[1]]))
    assert after.k.dtype == after.v.dtype == jnp.bfloat16


def test_an_empty_cache_has_one_entry_per_layer_and_only_the_key_heads(
    tiny_config: ModelConfig,
) -> None:
    cfg = tiny_config.llama
    caches = init_cache(cfg, 3, capacity=10, dtype=jnp.bfloat16)
    assert len(caches) == cfg.num_layers
    for cache in caches:
        for leaf in (cache.k, cache.v):
            assert leaf.shape == (3, cfg.num_kv_heads, 10, cfg.head_dim)
            assert leaf.dtype == jnp.bfloat16
