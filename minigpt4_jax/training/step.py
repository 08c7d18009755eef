"""The train step: gradient with respect to `llama_proj` and nothing else.

The frozen parameters are an argument of their own. They are never closed over (XLA would bake them into the program)
and never part of a tree that a norm or an optimizer walks over (which would bring their gradients back to life).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.minigpt4 import MiniGPT4, apply_method, make_positions
from minigpt4_jax.sharding import constrain_rows
from minigpt4_jax.training.loss import cross_entropy
from minigpt4_jax.training.state import Projection, TrainBatch, TrainState

Frozen = dict[str, Any]
"""The parameter tree without `llama_proj` and without what makes features of pictures (`vision.py` has these)."""


class StepNumbers(NamedTuple):
    """What a step says about itself, from before its update."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    """Length of this batch's gradient."""
    image_token_std: Float[Array, ""]
    """Standard deviation of all numbers in the batch's image tokens. Far from that of the token embeddings (about 0.1),
    a frozen language model does not read them: the first thing to look at when a loss goes up."""
    tokens: Int[Array, ""]
    """Real tokens of the batch, over all devices: pictures and text without padding."""


def answer_logits(
    projection: Projection, frozen: Frozen, batch: TrainBatch, *, model: MiniGPT4
) -> tuple[Float[Array, "B A V"], Float[Array, "B T D"]]:
    """Logits at the places that predict the batch's targets, and the image tokens that they were given."""
    params = {**frozen, "llama_proj": projection}
    image_embeds = apply_method(model, params, "project", batch.features)
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
    logits = apply_method(model, params, "head", constrain_rows(picked, "x"))
    return constrain_rows(logits, "logits"), image_embeds


def loss_fn(
    projection: Projection, frozen: Frozen, batch: TrainBatch, *, model: MiniGPT4
) -> tuple[Float[Array, ""], Float[Array, "B T D"]]:
    """Answer loss of one batch as a function of the projection, and its image tokens."""
    logits, image_embeds = answer_logits(projection, frozen, batch, model=model)
    return cross_entropy(logits, batch.target_ids, batch.target_mask), image_embeds


def make_train_step(
    model: MiniGPT4, tx: optax.GradientTransformationExtraArgs
) -> Callable[[TrainState, Frozen, TrainBatch], tuple[TrainState, StepNumbers]]:
    """`train_step(state, frozen, batch) -> (state, numbers)`; to be jitted by the loop with `state` donated."""

    def train_step(
        state: TrainState, frozen: Frozen, batch: TrainBatch
    ) -> tuple[TrainState, StepNumbers]:
        (loss, image_embeds), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.projection, frozen, batch, model=model
        )
        updates, opt_state = tx.update(
            grads, state.opt_state, state.projection, num_targets=jnp.sum(batch.target_mask)
        )
        projection = optax.apply_updates(state.projection, updates)
        numbers = StepNumbers(
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            image_token_std=jnp.std(image_embeds.astype(jnp.float32)),
            tokens=jnp.sum(batch.attention_mask),
        )
        after = TrainState(step=state.step + 1, projection=projection, opt_state=opt_state)
        return _unless_broken(state, after, numbers), numbers

    return train_step


def _unless_broken(before: TrainState, after: TrainState, numbers: StepNumbers) -> TrainState:
    """`after`; or `before`, its step negative, where the loss or the gradient is not finite, and ever after.

    The sign keeps the steps that are on their way, when the loop reads this one's numbers, from moving what it left.
    """
    sound = (before.step >= 0) & jnp.isfinite(numbers.loss) & jnp.isfinite(numbers.grad_norm)
    kept: TrainState = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, before)
    stopped = jnp.minimum(before.step, -1 - before.step)
    return kept._replace(step=jnp.where(sound, after.step, stopped))
