"""models/kv_cache.py: prompts go to the slots from 0, single tokens to the slot of their position; in place; in int8.

What is stored is checked bit by bit, by both ways of writing a token: the one for TPUs runs on a CPU just as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.kv_cache import (
    PLACES,
    LayerCache,
    _scatter_tokens,
    _select_tokens,
    _write_tokens,
    init_cache,
)
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import apply_method, make_model

KV_HEADS, HEAD_DIM = 2, 3


def empty(batch: int, slots: int) -> LayerCache:
    return LayerCache(
        k=jnp.full((batch, KV_HEADS, HEAD_DIM, slots), -1.0),
        v=jnp.full((batch, KV_HEADS, slots, HEAD_DIM), -1.0),
    )


def draw(*lead: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(*lead, KV_HEADS, HEAD_DIM)).astype(np.float32)


def test_a_prompt_fills_the_first_slots() -> None:
    k, v = draw(2, 4), draw(2, 4) + 1
    cache = empty(2, 6).update(
        jnp.asarray(k), jnp.asarray(v), jnp.broadcast_to(jnp.arange(4)[None], (2, 4)), length=6
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
        length=6,
    )
    for whole, part in zip(cache.read(2, 6), cache.read(2, 3), strict=True):
        assert part.shape == (2, 3, KV_HEADS, HEAD_DIM)
        np.testing.assert_array_equal(part, whole[:, :3])


def test_single_tokens_go_to_their_rows_own_slots() -> None:
    k, v = draw(2, 1), draw(2, 1) + 1
    cache = empty(2, 6).update(jnp.asarray(k), jnp.asarray(v), jnp.asarray([[5], [2]]), length=6)
    expected = np.full((2, 6, KV_HEADS, HEAD_DIM), -1.0, np.float32)
    expected[0, 5], expected[1, 2] = k[0, 0], k[1, 0]
    np.testing.assert_array_equal(cache.read(2, 6)[0], expected)
    expected[0, 5], expected[1, 2] = v[0, 0], v[1, 0]
    np.testing.assert_array_equal(cache.read(2, 6)[1], expected)


def test_a_stretch_goes_to_the_places_from_its_first_position_on() -> None:
    k, v = draw(1, 3), draw(1, 3) + 1
    cache = empty(2, 6).update(jnp.asarray(k), jnp.asarray(v), jnp.asarray([[2, 3, 4]]), length=6)
    for found, given in zip(cache.read(2, 6), (k, v), strict=True):
        expected = np.full((2, 6, KV_HEADS, HEAD_DIM), -1.0, np.float32)
        expected[0, 2:5] = given[0]
        np.testing.assert_array_equal(found, expected)


def test_rows_behind_those_given_are_neither_written_nor_read() -> None:
    cache = empty(3, 6).update(
        jnp.asarray(draw(2, 1)), jnp.asarray(draw(2, 1)), jnp.asarray([[5], [2]]), length=6
    )
    for whole, part in zip(cache.read(3, 6), cache.read(2, 6), strict=True):
        np.testing.assert_array_equal(whole[2], np.full((6, KV_HEADS, HEAD_DIM), -1.0))
        np.testing.assert_array_equal(part, whole[:2])


def test_a_cache_keeps_its_own_dtype() -> None:
    cache = LayerCache(
        k=jnp.zeros((1, KV_HEADS, HEAD_DIM, 4), jnp.bfloat16),
        v=jnp.zeros((1, KV_HEADS, 4, HEAD_DIM), jnp.bfloat16),
    )
    after = cache.update(
        jnp.asarray(draw(1, 1)), jnp.asarray(draw(1, 1)), jnp.asarray([[1]]), length=4
    )
    assert after.k.dtype == after.v.dtype == jnp.bfloat16


def test_an_empty_cache_has_one_entry_per_layer_and_only_the_key_heads(
    tiny_config: ModelConfig,
) -> None:
    cfg = tiny_config.llama
    caches = init_cache(cfg, 3, capacity=10, dtype=jnp.bfloat16)
    assert len(caches) == cfg.num_layers
    for cache in caches:
        assert cache.k.shape == (3, cfg.num_kv_heads, cfg.head_dim, 10)
        assert cache.v.shape == (3, cfg.num_kv_heads, 10, cfg.head_dim)
        assert cache.k.dtype == cache.v.dtype == jnp.bfloat16


def test_a_cache_of_more_or_fewer_places_keeps_what_both_have() -> None:
    k, v = draw(2, 6), draw(2, 6) + 1
    places = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
    cache = empty(2, 6).update(jnp.asarray(k), jnp.asarray(v), places, length=6)
    for shorter in (cache.crop(4), cache.resize(4)):
        assert shorter.capacity == 4
        for found, given in zip(shorter.read(2, 4), (k, v), strict=True):
            np.testing.assert_array_equal(found, given[:, :4])
    longer = cache.resize(8)
    assert longer.capacity == 8
    for found, given in zip(longer.read(2, 8), (k, v), strict=True):
        np.testing.assert_array_equal(found[:, :6], given)
        np.testing.assert_array_equal(found[:, 6:], 0.0)


# --- one token per row: a scatter or a select ---

WAYS = {"scatter": _scatter_tokens, "select": partial(_select_tokens, length=7)}
LEAVES = {"keys": ((2, 5, 9), 3), "values": ((2, 9, 5), 2), "scales": ((2, 9), 2)}
"""What is behind the rows of a leaf of 9 places, and the axis of these."""


def draw_leaf(dtype: Any, *shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).normal(size=shape) * 40).astype(dtype)


def draw_write(
    dtype: Any, tail: tuple[int, ...], axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A leaf of 4 rows, what 3 rows write, where, and what must come of it."""
    leaf, new = draw_leaf(dtype, 4, *tail), draw_leaf(dtype, 3, *tail).take([0], axis) + 1
    places = np.asarray([6, 0, 3], np.int32)
    expected = leaf.copy()
    for row, place in enumerate(places):
        np.moveaxis(expected[row], axis - 1, 0)[place] = new[row].squeeze(axis - 1)
    assert not np.array_equal(expected, leaf)
    return leaf, new, places, expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8])
@pytest.mark.parametrize("kind", LEAVES)
def test_a_token_changes_its_place_and_not_one_bit_of_any_other(
    way: str, dtype: Any, kind: str
) -> None:
    leaf, new, places, expected = draw_write(dtype, *LEAVES[kind])
    write = jax.jit(partial(WAYS[way], axis=LEAVES[kind][1]))
    found = write(jnp.asarray(leaf), jnp.asarray(new), jnp.asarray(places))
    assert found.dtype == dtype
    assert np.asarray(found).tobytes() == expected.tobytes()


def test_one_export_holds_both_ways_and_writes_in_place() -> None:
    leaf, new, places, expected = draw_write(np.float32, *LEAVES["keys"])

    def write(leaf: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
        return _write_tokens(leaf, new, places=places, length=7, axis=3)

    jitted = jax.jit(write, donate_argnums=0)
    args = (jnp.asarray(leaf), jnp.asarray(new), jnp.asarray(places))
    for platforms, scatters, selects in (
        (("cpu",), True, False),
        (("cuda",), True, False),
        (("tpu",), False, True),
        (("cpu", "cuda", "tpu"), True, True),
    ):
        exported = jax.export.export(jitted, platforms=platforms)(*args)
        text = exported.mlir_module()
        assert ("stablehlo.scatter" in text, "dynamic_update_slice" in text) == (scatters, selects)
    compiled = jax.jit(exported.call, donate_argnums=0).lower(*args).compile()
    assert "conditional" not in compiled.as_text()
    assert compiled.memory_analysis().alias_size_in_bytes == leaf.nbytes
    assert np.asarray(compiled(*args)).tobytes() == expected.tobytes()


# --- int8 ---


def test_an_int8_cache_has_one_scale_per_token_and_head_and_is_off_by_half_of_it_at_most() -> None:
    empty_cache = LayerCache(
        k=jnp.zeros((3, KV_HEADS, HEAD_DIM, 6), jnp.int8),
        v=jnp.zeros((3, KV_HEADS, 6, HEAD_DIM), jnp.int8),
        k_scale=jnp.zeros((3, KV_HEADS, 6)),
        v_scale=jnp.zeros((3, KV_HEADS, 6)),
    )
    # Tokens and heads of very different sizes: a scale that two of them share would show.
    size = np.float32(10) ** np.arange(-3, 5).reshape(2, 2, KV_HEADS, 1)
    k, v = draw(2, 2) * size, draw(2, 2) * size[::-1]
    stretch = empty_cache.update(
        jnp.asarray(k), jnp.asarray(v), jnp.asarray([[1, 2], [1, 2]]), length=6
    )
    tokens = empty_cache
    for place in (0, 1):
        tokens = tokens.update(
            jnp.asarray(k[:, place : place + 1]),
            jnp.asarray(v[:, place : place + 1]),
            jnp.asarray([[1 + place], [1 + place]]),
            length=6,
        )
    for left, right in zip(jax.tree.leaves(stretch), jax.tree.leaves(tokens), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    for values, scales, given in zip(
        stretch.read(2, 3), stretch.read_scales(2, 3), (k, v), strict=True
    ):
        assert values.dtype == jnp.int8
        assert scales is not None
        scale = np.asarray(scales).transpose(0, 2, 1)[:, 1:]
        np.testing.assert_allclose(scale, np.abs(given).max(-1) / 127, rtol=1e-6)
        error = np.abs(np.asarray(values)[:, 1:] * scale[..., None] - given)
        assert (error <= scale[..., None] * (0.5 + 1e-4)).all()
    for name, axis in PLACES.items():  # the third row, and the places around the two
        leaf = np.asarray(getattr(stretch, name))
        assert not leaf[2].any()
        assert not leaf.take([0, 3, 4, 5], axis).any()


def test_an_empty_int8_cache_has_leaves_of_its_own_with_row_and_head_in_front(
    tiny_config: ModelConfig,
) -> None:
    cfg = tiny_config.llama
    leaves = jax.tree.leaves(init_cache(cfg, 3, capacity=10, dtype=jnp.int8))
    assert len(leaves) == 4 * cfg.num_layers
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    assert all(leaf.shape[:2] == (3, cfg.num_kv_heads) for leaf in leaves)
    for name, axis in PLACES.items():
        assert getattr(init_cache(cfg, 3, capacity=10, dtype=jnp.int8)[0], name).shape[axis] == 10
    assert {leaf.dtype for leaf in leaves if leaf.ndim == 4} == {jnp.dtype(jnp.int8)}
    assert {leaf.dtype for leaf in leaves if leaf.ndim == 3} == {jnp.dtype(jnp.float32)}
    for dtype in (jnp.float32, jnp.bfloat16):
        assert init_cache(cfg, 3, capacity=10, dtype=dtype)[0].k_scale is None


# --- in place ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_a_step_updates_the_donated_cache_in_place_and_copies_no_layer(
    dtype: Any, tiny_params: Any, tiny_config: ModelConfig
) -> None:
    rows, capacity, length = 8, 1025, 64
    model = make_model(tiny_config, layout=DECODE, dtype=jnp.float32)
    params = convert_layout({"llama": tiny_params["llama"]}, DISK, DECODE, llama=tiny_config.llama)
    caches = init_cache(tiny_config.llama, rows, capacity=capacity, dtype=dtype)

    def step(params: Any, caches: Any, embeds: jax.Array, positions: jax.Array) -> Any:
        mask = make_cache_mask(positions, length)
        hidden, caches, _ = apply_method(
            model, params, "decode", embeds, positions=positions, mask=mask, caches=caches
        )
        return hidden, caches

    embeds = jnp.ones((rows, 1, tiny_config.llama.width))
    positions = jnp.arange(rows)[:, None]
    # `lower` rebuilds its arguments from abstract values, which the checked signatures do not know.
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        compiled = (
            jax.jit(step, donate_argnums=1).lower(params, caches, embeds, positions).compile()
        )
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert memory.temp_size_in_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(caches[0]))
    assert "conditional" not in compiled.as_text()
