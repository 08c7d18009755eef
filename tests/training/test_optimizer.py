"""training/optimizer.py: AdamW, the schedules and accumulation against their definitions.

The original's own numbers are in tests/parity/golden/test_golden_optim.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.train_config import OptimizerConfig
from minigpt4_jax.training.optimizer import decays_weight, make_optimizer, make_schedule
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


# --- the other schedules ---


SCHEDULES = ["warmup_cosine", "warmup_step", "linear_warmup_cosine_lr", "linear_warmup_step_lr"]


def rates(config: OptimizerConfig) -> list[float]:
    schedule = make_schedule(config)
    return [float(schedule(step)) for step in range(config.max_steps)]


def test_the_originals_cosine_runs_from_step_0_so_the_rate_drops_after_the_warm_up() -> None:
    # Stage 1 of the published model, a thousandth as long.
    config = OptimizerConfig(
        lr_sched="linear_warmup_cosine_lr", init_lr=1e-4, min_lr=8e-5, warmup_lr=1e-6, warmup_steps=5, max_steps=20,
        iters_per_epoch=5,
    )  # fmt: skip
    found = rates(config)
    np.testing.assert_allclose(found[:5], [1e-6 + 99e-6 * i / 5 for i in range(5)], rtol=1e-12)
    expected = [8e-5 + 2e-5 * 0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(5, 20)]
    np.testing.assert_allclose(found[5:], expected, rtol=1e-12)
    assert found[5] == pytest.approx(9.707e-5, rel=1e-4)


def test_the_originals_warm_up_starts_again_in_every_epoch_it_reaches_into() -> None:
    config = OptimizerConfig(
        lr_sched="linear_warmup_cosine_lr", init_lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup_steps=4, max_steps=6,
        iters_per_epoch=2,
    )  # fmt: skip
    np.testing.assert_allclose(rates(config)[:4], [0.2, 0.4, 0.2, 0.4], rtol=1e-12)


def test_the_originals_stairs_warm_up_in_the_first_epoch_only() -> None:
    config = OptimizerConfig(
        lr_sched="linear_warmup_step_lr", init_lr=1.0, min_lr=0.3, warmup_lr=0.2, warmup_steps=4, max_steps=12,
        iters_per_epoch=3, lr_decay_rate=0.5,
    )  # fmt: skip
    expected = [0.2, 0.4, 0.6, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-12)


def test_the_sane_stairs_warm_up_whatever_the_epochs_are() -> None:
    config = OptimizerConfig(
        lr_sched="warmup_step", init_lr=1.0, min_lr=0.3, warmup_lr=0.2, warmup_steps=4, max_steps=12,
        iters_per_epoch=3, lr_decay_rate=0.5,
    )  # fmt: skip
    expected = [0.2, 0.4, 0.6, 0.8, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-12)


@pytest.mark.parametrize("lr_sched", ["linear_warmup_cosine_lr", "linear_warmup_step_lr"])
@pytest.mark.parametrize("warmup_lr", [-1.0, 0.5])
def test_the_originals_rate_never_exceeds_its_peak_and_minus_one_is_no_warm_up(
    lr_sched: str, warmup_lr: float
) -> None:
    config = OptimizerConfig(
        lr_sched=lr_sched, init_lr=0.1, warmup_lr=warmup_lr, warmup_steps=3, max_steps=6
    )
    assert rates(config)[:3] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("lr_sched", SCHEDULES)
def test_the_rate_on_the_device_is_the_one_on_the_host(lr_sched: str) -> None:
    config = OptimizerConfig(
        lr_sched=lr_sched, init_lr=1e-4, min_lr=0.0, warmup_steps=30, max_steps=200, iters_per_epoch=50,
        lr_decay_rate=0.7,
    )  # fmt: skip
    on_device = jax.jit(make_schedule(config))(jnp.arange(200))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, rates(config), rtol=1e-6)


@pytest.mark.parametrize("lr_sched", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_run_that_is_all_warm_up_rises_to_its_end(lr_sched: str, steps: int) -> None:
    config = OptimizerConfig(
        lr_sched=lr_sched, init_lr=0.1, min_lr=0.01, warmup_lr=0.001, warmup_steps=steps, max_steps=steps
    )  # fmt: skip
    expected = [0.001 + 0.099 * step / steps for step in range(steps)]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-12)
    on_device = jax.jit(make_schedule(config))(jnp.arange(steps + 2))
    np.testing.assert_allclose(on_device[:steps], expected, rtol=1e-6)
    assert np.isfinite(on_device).all()  # also past the end, where Adam may ask
    (update,) = run_updates(config, GRADS[:1], [1], PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update))


def test_a_run_may_end_within_the_originals_warm_up_only() -> None:
    OptimizerConfig(lr_sched="linear_warmup_cosine_lr", warmup_steps=200, max_steps=5)
    with pytest.raises(UserError, match="warmup_steps is 200"):
        OptimizerConfig(warmup_steps=200, max_steps=5)


# --- which leaves decay ---


def test_decay_leaves_out_vectors_and_names_with_bias_ln_or_bn() -> None:
    shapes = {
        "llama_proj": {"kernel": (3, 2), "bias": (2,)},
        "query_tokens": (1, 4, 2),
        "rel_pos_bias": (5, 2),
        "ln_vision": {"scale": (1, 2)},
        "layers": {"0": {"bn": {"kernel": (2, 2)}, "norm": {"scale": (2,)}}},
    }
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    assert decays_weight(tree) == {
        "llama_proj": {"kernel": True, "bias": False},
        "query_tokens": True,
        "rel_pos_bias": False,
        "ln_vision": {"scale": False},
        "layers": {"0": {"bn": {"kernel": False}, "norm": {"scale": False}}},
    }


# --- accumulation ---

STEADY = OptimizerConfig(
    init_lr=0.1, min_lr=0.1, warmup_lr=0.1, warmup_steps=0, max_steps=12, eps=1.0, weight_decay=0.0
)
"""One rate, and an eps so large that Adam's first step tells a gradient's size and not only its sign."""


def run_updates(
    config: OptimizerConfig, grads: list[Any], num_targets: list[int], params: Any
) -> list[Any]:
    """Each batch's update of `params`, which stay as they are."""
    tx = make_optimizer(config)
    state, found = tx.init(params), []
    update = jax.jit(lambda grads, state, count: tx.update(grads, state, params, num_targets=count))
    for leaf, count in zip(grads, num_targets, strict=True):
        updates, state = update(leaf, state, jnp.asarray(count))
        found.append(updates)
    return found


PARAMS = {"kernel": jnp.full((3, 2), 5.0), "bias": jnp.full(2, 5.0)}
RNG = np.random.default_rng(27)
GRADS = [
    {"kernel": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "bias": jnp.ones(2)}
    for _ in range(6)
]


def assert_updates(found: list[Any], expected: dict[int, Any]) -> None:
    """Zeros but after the batches in `expected`, whose updates are those of these whole gradients in turn."""
    whole = run_updates(STEADY, list(expected.values()), [1] * len(expected), PARAMS)
    for batch, updates in enumerate(found):
        if batch not in expected:
            assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(updates)), batch
    for updates, reference in zip([found[batch] for batch in expected], whole, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, reference)


def test_accumulation_weighs_batches_by_their_tokens_as_one_large_batch_would() -> None:
    config = dataclasses.replace(STEADY, accum_grad_iters=3)
    found = run_updates(config, GRADS, [3, 1, 4, 10, 0, 10], PARAMS)
    expected = {
        2: jax.tree.map(lambda a, b, c: (3 * a + b + 4 * c) / 8, *GRADS[:3]),
        5: jax.tree.map(lambda a, c: (a + c) / 2, GRADS[3], GRADS[5]),
    }
    assert_updates(found, expected)


def test_the_originals_accumulation_sums_and_takes_left_overs_into_the_next_epoch() -> None:
    config = dataclasses.replace(
        STEADY, accum_grad_iters=2, accum_grads="sum", max_steps=6, iters_per_epoch=3
    )
    found = run_updates(config, GRADS, [3, 1, 4, 10, 0, 10], PARAMS)
    expected = {
        1: jax.tree.map(lambda a, b: a + b, *GRADS[:2]),
        4: jax.tree.map(lambda a, b, c: a + b + c, *GRADS[2:5]),
    }
    assert_updates(found, expected)


@pytest.mark.parametrize(("accum_grads", "batches"), [("mean", [1, 3, 5]), ("sum", [1, 4])])
def test_an_update_has_the_rate_of_its_last_batch(accum_grads: str, batches: list[int]) -> None:
    config = OptimizerConfig(
        lr_sched="linear_warmup_cosine_lr", init_lr=0.1, warmup_lr=0.01, warmup_steps=2, max_steps=6, weight_decay=0.5,
        iters_per_epoch=3, accum_grad_iters=2, accum_grads=accum_grads,
    )  # fmt: skip
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)  # decay alone moves the kernel, by rate * 0.5 * 5
    found = run_updates(config, [zeros] * 6, [1] * 6, PARAMS)
    rate = make_schedule(config)
    for batch, updates in enumerate(found):
        expected = -rate(batch) * 2.5 if batch in batches else 0.0
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_accumulation_that_would_lose_batches_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_steps is 10 and accum_grad_iters 3"):
        OptimizerConfig(max_steps=10, warmup_steps=0, accum_grad_iters=3)
    with pytest.raises(UserError, match=r"accum_grad_iters is 3 in epochs of 2 steps"):
        OptimizerConfig(
            max_steps=10, warmup_steps=0, iters_per_epoch=2, accum_grad_iters=3, accum_grads="sum"
        )
