"""training/optimizer.py: AdamW and its schedule against NumPy; nothing but the projection has moments."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt4_jax.config import OptimizerConfig
from minigpt4_jax.training.optimizer import make_optimizer, make_schedule
from minigpt4_jax.training.state import init_state

CONFIG = OptimizerConfig(
    init_lr=0.1, min_lr=0.01, warmup_lr=0.001, warmup_steps=4, max_steps=20, weight_decay=0.3
)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear to `init_lr` at the end of the warm-up, then half a cosine down to `min_lr` at the last step."""
    if step < config.warmup_steps:
        part = step / config.warmup_steps
        return config.warmup_lr + part * (config.init_lr - config.warmup_lr)
    part = min(1.0, (step - config.warmup_steps) / (config.max_steps - config.warmup_steps))
    return config.min_lr + (config.init_lr - config.min_lr) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_rate_rises_linearly_and_falls_as_a_cosine(warmup_steps: int) -> None:
    config = OptimizerConfig(
        init_lr=0.1, min_lr=0.01, warmup_lr=0.001, warmup_steps=warmup_steps, max_steps=20
    )
    schedule = make_schedule(config)
    found = [float(schedule(step)) for step in range(23)]
    np.testing.assert_allclose(
        found, [learning_rate(step, config) for step in range(23)], rtol=1e-5
    )
    assert max(found) == pytest.approx(0.1)


def test_updates_equal_adamw_and_the_bias_does_not_decay() -> None:
    rng = np.random.default_rng(21)
    params: Any = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    tx = make_optimizer(CONFIG)
    found = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = tx.init(found)
    first = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    second = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    for step in range(6):
        grads = {name: rng.normal(size=leaf.shape) for name, leaf in params.items()}
        updates, state = tx.update(
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grads), state, found
        )
        found = optax.apply_updates(found, updates)
        for name, leaf in params.items():
            first[name] = CONFIG.beta1 * first[name] + (1 - CONFIG.beta1) * grads[name]
            second[name] = CONFIG.beta2 * second[name] + (1 - CONFIG.beta2) * grads[name] ** 2
            mean = first[name] / (1 - CONFIG.beta1 ** (step + 1))
            spread = np.sqrt(second[name] / (1 - CONFIG.beta2 ** (step + 1)))
            decay = CONFIG.weight_decay * leaf if name == "kernel" else 0.0
            rate = learning_rate(step, CONFIG)
            params[name] = leaf - rate * (mean / (spread + CONFIG.eps) + decay)
            np.testing.assert_allclose(found[name], params[name], rtol=1e-4, atol=1e-5)


def test_the_state_holds_the_projection_its_two_moments_and_counters_only() -> None:
    projection = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    state = init_state(projection, make_optimizer(CONFIG))
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert shapes == sorted([(6, 4), (4,)] * 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
