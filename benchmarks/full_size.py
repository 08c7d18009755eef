"""Random weights of any size, made where they are used: on the device, in the layout that decoding or training reads.

For: measuring the published sizes without their weights. No array ever lies on the host, so 13B takes seconds. Not for:
tests of results: the numbers are lively (norms scale by one, kernels keep the variance), and mean nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.layout import DISK, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import Params, abstract_params

INT8_RMS = 127 / 3**0.5
"""Root mean square of whole numbers spread evenly over -127 to 127."""


def abstract_params_in(config: ModelConfig, layout: Layout, dtype: DTypeLike) -> Params:
    """Names, shapes and dtypes of a full tree in a layout, `dtype` where `layout` leaves the choice."""
    tree: Params = jax.eval_shape(
        lambda params: convert_layout(params, DISK, layout, llama=config.llama),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(config)),
    )
    return tree


def random_params(abstract: Params, *, seed: int = 0) -> Params:
    """A tree like `abstract`, drawn leaf by leaf on the default device; equal shapes share one compiled function."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        _draw(key, _size([part.key for part in path], abstract), shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype))
        for (path, leaf), key in zip(leaves, keys, strict=True)
    ]  # fmt: skip
    return jax.tree.unflatten(tree, drawn)


def streamed_bytes(params: Params) -> int:
    """Bytes of the language model that a decode step reads whole: all but the embedding, of which it reads a row each.

    A tied embedding is the head too, and counts.
    """
    llama = dict(params["llama"])
    if "lm_head" in llama:
        del llama["embed_tokens"]
    return tree_bytes(llama)


def matmul_weights(params: Params) -> int:
    """Weights of the language model's layers that every token is multiplied with (no norms, embeddings, head)."""
    layers = params["llama"]["layers"]
    kernels = [leaf for leaf in jax.tree.leaves(layers) if leaf.ndim == 2]
    return sum(leaf.size for leaf in kernels)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(names: list[str], abstract: Params) -> tuple[float, float]:
    """Mean and spread of a leaf. An int8 leaf has its own spread: `NAME_scale` beside it makes the numbers of it."""
    *folders, name = names
    siblings = functools.reduce(lambda tree, part: tree[part], folders, abstract)
    stacked = "layers" in folders and not any(folder.isdigit() for folder in folders)
    if name == "bias":
        return 0.0, 0.0
    if name == "scale":  # of a norm
        return 1.0, 0.0
    matrix = siblings[name.removesuffix("_scale")].shape[1 if stacked else 0 :]
    spread = 1 / math.sqrt(math.prod(matrix[:-1]) or 1)
    return (spread / INT8_RMS, 0.0) if name.endswith("_scale") else (0.0, spread)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(
    key: jax.Array, size: tuple[float, float], *, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    if dtype == jnp.int8:
        bits = jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
        return jnp.maximum(bits, -127)
    mean, spread = (jnp.asarray(number, dtype) for number in size)
    return mean + spread * jax.random.normal(key, shape, dtype)
