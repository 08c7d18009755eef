"""The train step: gradient with respect to `llama_proj` and nothing else.

The frozen parameters are an argument of their own. They are never closed over (XLA would bake them into the program)
and never part of a tree that a norm or an optimizer walks over (which would bring their gradients back to life).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.minigpt4 import MiniGPT4, apply_method, make_positions
from minigpt4_jax.training.loss import cross_entropy
from minigpt4_jax.training.state import Projection, TrainBatch, TrainState

Frozen = dict[str, Any]
"""The parameter tree without `vit` (`vision.py` has its features) and without `llama_proj`."""


def loss_fn(
    projection: Projection, frozen: Frozen, batch: TrainBatch, *, model: MiniGPT4
) -> Float[Array, ""]:
    """Answer loss of one batch as a function of the projection."""
    params = {**frozen, "llama_proj": projection}
    image_embeds = apply_method(model, params, "project", batch.patches)
    embeds = apply_method(model, params, "embed_prompt", batch.token_ids, image_embeds)
    hidden, _, _ = apply_method(
        model,
        params,
        "decode",
        embeds,
        positions=make_positions(batch.attention_mask),
        mask=make_causal_mask(batch.attention_mask),
        caches=None,
    )
    picked = jnp.take_along_axis(hidden, batch.target_positions[:, :, None], axis=1)
    logits = apply_method(model, params, "head", picked)
    return cross_entropy(logits, batch.target_ids, batch.target_mask)


def make_train_step(
    model: MiniGPT4, tx: optax.GradientTransformation
) -> Callable[[TrainState, Frozen, TrainBatch], tuple[TrainState, Float[Array, ""]]]:
    """`train_step(state, frozen, batch) -> (state, loss)`; to be jitted by the loop with `state` donated."""

    def train_step(
        state: TrainState, frozen: Frozen, batch: TrainBatch
    ) -> tuple[TrainState, Float[Array, ""]]:
        loss, grads = jax.value_and_grad(loss_fn)(state.projection, frozen, batch, model=model)
        updates, opt_state = tx.update(grads, state.opt_state, state.projection)
        projection = optax.apply_updates(state.projection, updates)
        return TrainState(step=state.step + 1, projection=projection, opt_state=opt_state), loss

    return train_step
