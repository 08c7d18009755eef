"""Cross-entropy over the answer tokens. The LM head runs on those positions only."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "B A V"],
    target_ids: Int[Array, "B A"],
    target_mask: Bool[Array, "B A"],
) -> Float[Array, ""]:
    """Mean over all counted targets of the batch, in float32 (`reduction="mean"` of the original)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(target_mask, target_ids, 0)
    )
    return jnp.sum(losses * target_mask) / jnp.maximum(jnp.sum(target_mask), 1)
