"""Cross-entropy over the answer tokens. The LM head runs on those positions only."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def target_losses(
    logits: Float[Array, "B A V"],
    target_ids: Int[Array, "B A"],
    target_mask: Bool[Array, "B A"],
) -> Float[Array, "B A"]:
    """Loss of every target in float32; 0 where it does not count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(target_mask, target_ids, 0)
    )
    return jnp.where(target_mask, losses, 0.0)


def cross_entropy(
    logits: Float[Array, "B A V"],
    target_ids: Int[Array, "B A"],
    target_mask: Bool[Array, "B A"],
) -> Float[Array, ""]:
    """Mean over all counted targets of the batch, in float32 (`reduction="mean"` of the original)."""
    losses = target_losses(logits, target_ids, target_mask)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(target_mask), 1)


def cross_entropy_per_sample(
    logits: Float[Array, "B A V"],
    target_ids: Int[Array, "B A"],
    target_mask: Bool[Array, "B A"],
    *,
    length: int,
) -> Float[Array, " B"]:
    """`reduction="none"` of the original: a row's losses over all places of its padded sequence, not over its targets.

    Args:
        length: tokens of the padded rows as the original lays them out; it divides by the `length - 1` predictions in
            them, those of prompt and padding counted as zeros. So its numbers compare rows of one batch only.
    """
    return jnp.sum(target_losses(logits, target_ids, target_mask), axis=1) / (length - 1)
