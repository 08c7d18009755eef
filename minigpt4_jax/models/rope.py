"""Rotary position embeddings in the half-split form of Hugging Face and the original (`rotate_half`).

GGUF and Meta files keep the interleaved form; `convert/` re-orders the rows of q and k, never this file.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B S N H"], positions: Int[Array, "B S"], *, base: float
) -> Float[Array, "B S N H"]:
    """Rotates the pairs `(x[i], x[i + H/2])` by `position * base ** (-2i/H)` (Su et al., arXiv 2104.09864).

    Angles and the rotation are computed in float32; the result has the dtype of `x`.
    """
    half = x.shape[-1] // 2
    inv_freq = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * inv_freq[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
