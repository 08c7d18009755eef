"""models/eva_vit.py against a NumPy ViT in float64, and the resize of its position embedding."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.eva_vit import EvaVit, resize_pos_embed

RNG = np.random.default_rng(5)


def layer_norm(x: np.ndarray, params: Any, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * params["scale"] + params["bias"]


def numpy_vit(params: Any, image: np.ndarray, config: Any) -> list[np.ndarray]:
    """One picture, one head at a time; returns the stream after every block."""
    patches = []
    for row in range(config.grid):
        for column in range(config.grid):
            top, left = row * config.patch_size, column * config.patch_size
            pixels = image[top : top + config.patch_size, left : left + config.patch_size]
            kernel = params["patch_embed"]["kernel"]
            patches.append(np.tensordot(pixels, kernel, axes=3) + params["patch_embed"]["bias"])
    x = np.concatenate([params["cls_token"][0], np.stack(patches)]) + params["pos_embed"][0]
    states = []
    for i in range(config.num_layers):
        block = params["blocks"][str(i)]
        attn = block["attn"]
        y = layer_norm(x, block["norm1"], config.norm_eps)
        q = y @ attn["q_proj"]["kernel"] + attn["q_proj"]["bias"]
        k = y @ attn["k_proj"]["kernel"]
        v = y @ attn["v_proj"]["kernel"] + attn["v_proj"]["bias"]
        heads = []
        for n in range(config.num_heads):
            part = slice(n * config.head_dim, (n + 1) * config.head_dim)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(config.head_dim))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        x = x + np.concatenate(heads, -1) @ attn["o_proj"]["kernel"] + attn["o_proj"]["bias"]
        y = layer_norm(x, block["norm2"], config.norm_eps)
        y = y @ block["mlp"]["fc1"]["kernel"] + block["mlp"]["fc1"]["bias"]
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + y @ block["mlp"]["fc2"]["kernel"] + block["mlp"]["fc2"]["bias"]
        states.append(x)
    return states


@pytest.fixture(scope="module")
def images(tiny_config: ModelConfig) -> np.ndarray:
    size = tiny_config.vit.image_size
    return RNG.normal(size=(2, size, size, 3)).astype(np.float32)


def test_every_block_equals_the_numpy_vit(
    tiny_params: Any, tiny_config: ModelConfig, images: np.ndarray
) -> None:
    vit = EvaVit(tiny_config.vit, False, jnp.float32)
    tokens, states = jax.jit(vit.apply)({"params": tiny_params["vit"]}, jnp.asarray(images))
    tokens, states = np.asarray(tokens), np.asarray(states)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny_params["vit"])
    for number, image in enumerate(images):
        expected = numpy_vit(wide, image.astype(np.float64), tiny_config.vit)
        np.testing.assert_allclose(states[:, number], np.stack(expected), rtol=0, atol=2e-5)
        np.testing.assert_array_equal(tokens[number], states[-1, number])


def test_pictures_of_a_batch_do_not_see_each_other(
    tiny_params: Any, tiny_config: ModelConfig, images: np.ndarray
) -> None:
    vit = EvaVit(tiny_config.vit, False, jnp.float32)
    apply = jax.jit(vit.apply)
    together, _ = apply({"params": tiny_params["vit"]}, jnp.asarray(images))
    alone, _ = apply({"params": tiny_params["vit"]}, jnp.asarray(images[1:]))
    np.testing.assert_allclose(np.asarray(together)[1:], alone, rtol=0, atol=1e-5)


def test_a_picture_of_another_size_is_refused(tiny_params: Any, tiny_config: ModelConfig) -> None:
    vit = EvaVit(tiny_config.vit, False, jnp.float32)
    with pytest.raises(ValueError, match=r"\(1, 35, 28, 3\); expected \[I, 28, 28, 3\]"):
        vit.apply({"params": tiny_params["vit"]}, jnp.zeros((1, 35, 28, 3)))


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, in the nested form that image libraries use."""
    a, x = -0.75, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


def resize_by_taps(patches: np.ndarray, grid: int) -> np.ndarray:
    """`[g, g, D]` to `[grid, grid, D]`: for each output cell, the sixteen clamped input cells around it."""
    source = patches.shape[0]
    out = np.zeros((grid, grid, patches.shape[2]))
    for i in range(grid):
        for j in range(grid):
            y, x = (i + 0.5) * source / grid - 0.5, (j + 0.5) * source / grid - 0.5
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    row, column = math.floor(y) + dy, math.floor(x) + dx
                    weight = cubic(y - row) * cubic(x - column)
                    inside = min(max(row, 0), source - 1), min(max(column, 0), source - 1)
                    out[i, j] += weight * patches[inside]
    return out


@pytest.mark.parametrize(("source", "grid"), [(4, 7), (7, 4), (9, 4), (5, 2), (3, 8)])
def test_resize_equals_sixteen_taps_per_cell(source: int, grid: int) -> None:
    pos = RNG.normal(size=(1, 1 + source**2, 6)).astype(np.float32)
    found = resize_pos_embed(pos, grid)
    assert found.dtype == np.float32
    expected = resize_by_taps(pos[0, 1:].reshape(source, source, 6).astype(np.float64), grid)
    np.testing.assert_allclose(found[0, 1:].reshape(grid, grid, 6), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], pos[:, 0])  # the class entry is no place in the grid


def test_an_equal_grid_changes_no_bit() -> None:
    pos = RNG.normal(size=(1, 17, 6)).astype(np.float32)
    assert resize_pos_embed(pos, 4).tobytes() == pos.tobytes()


@pytest.mark.parametrize("grid", [2, 3, 7, 20])
def test_a_constant_stays_constant(grid: int) -> None:
    pos = np.full((1, 26, 3), 0.7, np.float32)
    np.testing.assert_allclose(resize_pos_embed(pos, grid), 0.7, rtol=1e-6)


def test_a_downscale_is_not_smoothed() -> None:
    # Every third cell of a grid three times as large lies exactly on an output cell: no antialias means a copy.
    pos = RNG.normal(size=(1, 82, 3)).astype(np.float32)
    middle = pos[0, 1:].reshape(9, 9, 3)[1::3, 1::3]
    np.testing.assert_allclose(resize_pos_embed(pos, 3)[0, 1:].reshape(3, 3, 3), middle, rtol=1e-6)


def test_a_grid_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="12 patch entries; expected a square"):
        resize_pos_embed(np.zeros((1, 13, 4), np.float32), 4)
