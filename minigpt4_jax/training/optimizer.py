"""AdamW (or Muon) with linear warm-up and cosine decay over the projection alone.

The original (`common/optims.py`) counts the warm-up within an epoch and lets the cosine run from step 0, so that its
rate drops when the warm-up ends. Here the cosine starts where the warm-up ends.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib

from minigpt4_jax.config import OptimizerConfig

MUON_MOMENTUM = 0.95
"""Of the Nesterov momentum, as in Muon's reference implementation."""


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
    """AdamW or Muon; weight decay skips leaves of fewer than two dimensions (`runner_base.py`).

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) replaces the kernel's momentum by the nearest
    orthogonal matrix, so that every direction of the input moves at the same speed; the bias goes by Adam (Nesterov).
    Neighbouring patches are strongly correlated, and Adam's steps per number mostly move their common direction. Its
    rate is a length in the spectral norm: another scale than AdamW's.
    """
    schedule = make_schedule(config)

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    if config.name == "muon":
        return optax.contrib.muon(
            schedule,
            beta=MUON_MOMENTUM,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
        )
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
