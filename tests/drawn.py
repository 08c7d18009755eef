"""Random parameters for tests. Imports nothing of the package: what is imported here is not checked by beartype."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import numpy as np


def draw(abstract: Any) -> Any:
    """Random float32 parameters of an abstract tree, in NumPy, each leaf seeded by its name.

    Lively on purpose: kernels keep the variance of what passes through them and norms scale by about 1, so that a
    wrong mask, rope or head order moves the logits far beyond any tolerance. (Small weights everywhere would leave
    the residual stream alone and let such a mistake pass.)
    """

    def draw_leaf(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = "/".join(key.key for key in keys)
        noise = np.random.default_rng(zlib.crc32(path.encode())).normal(size=leaf.shape)
        match keys[-1].key:
            case "kernel":
                noise /= math.prod(leaf.shape[:-1]) ** 0.5
            case "scale":
                noise = 1 + 0.2 * noise
            case _:  # biases and embeddings
                noise *= 0.5
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw_leaf, abstract)
