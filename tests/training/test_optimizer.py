"""training/optimizer.py: AdamW and its schedule against NumPy; nothing but the projection has moments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt4_jax.config import OptimizerConfig, UserError
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


def test_muon_moves_every_direction_of_the_kernel_alike_and_the_bias_by_adam() -> None:
    rng = np.random.default_rng(22)
    config = dataclasses.replace(CONFIG, name="muon", weight_decay=0.0)
    # Singular values from 1 to 1000: a step per number would follow the largest.
    left, _ = np.linalg.qr(rng.normal(size=(24, 4)))
    right, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    gradient = {"kernel": left * [1000.0, 100.0, 10.0, 1.0] @ right, "bias": rng.normal(size=4)}
    params = {"kernel": jnp.zeros((24, 4)), "bias": jnp.zeros(4)}
    tx = make_optimizer(config)
    updates, _ = tx.update(
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradient), tx.init(params), params
    )
    along = -(left.T @ np.asarray(updates["kernel"]) @ right.T) / learning_rate(0, config)
    strength = np.diag(along)[:3]
    assert strength.min() > 0.6
    assert strength.max() < 1.3
    np.testing.assert_allclose(along - np.diag(np.diag(along)), 0.0, atol=0.05)
    # Nesterov's first step of Adam: the momentum as it will be after one more equal gradient.
    nesterov = CONFIG.beta1 * (1 - CONFIG.beta1) / (1 - CONFIG.beta1**2) + 1
    np.testing.assert_allclose(
        updates["bias"],
        -learning_rate(0, config) * nesterov * np.sign(gradient["bias"]),
        rtol=1e-4,
    )


def test_muon_decays_the_kernel_only() -> None:
    tx = make_optimizer(dataclasses.replace(CONFIG, name="muon"))
    params = {"kernel": jnp.full((3, 2), 5.0), "bias": jnp.full(2, 5.0)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decay = -learning_rate(0, CONFIG) * CONFIG.weight_decay * 5.0
    np.testing.assert_allclose(updates["kernel"], decay, rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_an_unknown_optimizer_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'lion'.*adamw, muon"):
        OptimizerConfig(name="lion")
