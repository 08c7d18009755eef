"""AdamW with linear warm-up and cosine decay over the projection alone.

The original (`common/optims.py`) counts the warm-up within an epoch and lets the cosine run from step 0, so that its
rate drops when the warm-up ends. Here the cosine starts where the warm-up ends.
"""

from __future__ import annotations

import jax
import optax

from minigpt4_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate as a function of the number of finished steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.warmup_lr,
        peak_value=config.init_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=config.max_steps,
        end_value=config.min_lr,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW; weight decay skips leaves of fewer than two dimensions (`runner_base.py`)."""
    return optax.adamw(
        make_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
