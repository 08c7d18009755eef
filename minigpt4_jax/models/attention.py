"""`attend`, the only attention of the project, and the masks it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.dims import Mask

_LOWEST = float(np.finfo(np.float32).min)


def attend(
    q: Float[Array, "B Sq N H"],
    k: Float[Array, "B Sk K H"],
    v: Float[Array, "B Sk K H"],
    *,
    mask: Mask | None,
    k_scale: Float[Array, "B K Sk"] | None = None,
    v_scale: Float[Array, "B K Sk"] | None = None,
) -> Float[Array, "B Sq N H"]:
    """Scaled dot-product attention, grouped-query when `K < N` (Vaswani 1706.03762; Ainslie 2305.13245).

    Scores are scaled by `H ** -0.5`; the softmax is reduced in float32. Query head `n` reads key head
    `n // (N // K)`, as in `repeat_kv` of the reference.

    Args:
        mask: True = attend; None = everything. A row without any True gives the mean of all values.
        k_scale, v_scale: what the keys and values of a place are to be multiplied with (an int8 cache). They are
            folded into scores and probabilities, one number per place, so that no scaled copy of the cache is written.

    Returns:
        The attended values in the dtype of `v`.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    # Heads in front, key heads' groups along the rows: plain batched matmuls. One einsum over the original order took
    # 1.7 times the CPU time at the smol LLM's training shapes, and the same at the ViT's.
    q = (q * head_dim**-0.5).reshape(batch, length, kv_heads, groups, head_dim)
    rows = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, head_dim)
    scores = (rows @ k.transpose(0, 2, 3, 1)).astype(jnp.float32)
    if k_scale is not None:
        scores = scores * k_scale[:, :, None]
    if mask is not None:
        scores = scores.reshape(batch, kv_heads, groups, length, -1)
        scores = jnp.where(mask[:, None, None], scores, _LOWEST).reshape(*rows.shape[:3], -1)
    weights = jax.nn.softmax(scores, axis=-1)
    if v_scale is not None:
        weights = weights * v_scale[:, :, None]
    attended = (weights.astype(v.dtype) @ v.transpose(0, 2, 1, 3)).reshape(
        batch, kv_heads, groups, length, head_dim
    )
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def make_causal_mask(attention_mask: Bool[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Token `q` sees token `s` when `s <= q` and `s` counts."""
    length = attention_mask.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & attention_mask[:, None, :]


def make_cache_mask(positions: Int[Array, "B Sq"], length: int) -> Bool[Array, "B Sq Sk"]:
    """Token at position `p` sees the places 0..p of the cache."""
    return jnp.arange(length)[None, None, :] <= positions[:, :, None]
