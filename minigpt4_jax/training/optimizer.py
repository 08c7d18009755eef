"""AdamW (or Muon) over the projection alone: learning rate, weight decay, accumulation.

For: `make_schedule` and `make_optimizer`. Not for: gradients (`step.py`). Each thing that the original does oddly
(`common/optims.py`, `runners/runner_base.py`, `tasks/base_task.py`) is a setting here beside its sane form, which is
the default; `docs/differences.md` lists them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float, Int

from minigpt4_jax.checkpoint import path_name
from minigpt4_jax.train_config import OptimizerConfig

MUON_MOMENTUM = 0.95
"""Of the Nesterov momentum, as in Muon's reference implementation."""


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of a batch as a function of the number of batches before it.

    `warmup_cosine` and `warmup_step` rise linearly from `warmup_lr` to `init_lr` over `warmup_steps`; then half a
    cosine falls to `min_lr` at the last step, or the rate is `init_lr * lr_decay_rate ** epoch`, at least `min_lr`.

    `linear_warmup_cosine_lr` counts the warm-up inside the epoch, so one longer than an epoch starts again, and lets
    the cosine run from step 0, so that the rate drops where the warm-up ends. `linear_warmup_step_lr` warms up in the
    first epoch, all of it or not, and never after. Both never go above `init_lr`.

    Given a Python or NumPy number it computes in float64 on the host, given a JAX array in float32.
    """
    first = config.warmup_lr if config.warmup_lr >= 0 else config.init_lr
    peak, low, warmup = config.init_lr, config.min_lr, config.warmup_steps

    def rate(step: Any) -> Any:
        xp: Any = jnp if isinstance(step, jax.Array) else np
        epoch, within = step // config.epoch_steps, step % config.epoch_steps

        def rising(at: Any) -> Any:
            return xp.minimum(peak, first + (peak - first) * at / max(warmup, 1))

        def cosine(done: Any, total: int) -> Any:
            # (1 + cos(pi done / total)) / 2, written so that float32 keeps its digits where it is almost 0.
            return low + (peak - low) * xp.sin(0.5 * np.pi * (total - done) / max(total, 1)) ** 2

        def stairs() -> Any:
            return xp.maximum(low, peak * config.lr_decay_rate**epoch)

        match config.lr_sched:
            case "warmup_cosine":
                total = config.max_steps - warmup
                warm = first + (peak - first) * step / max(warmup, 1)
                return xp.where(
                    step < warmup, warm, cosine(xp.minimum(step - warmup, total), total)
                )
            case "warmup_step":
                warm = first + (peak - first) * step / max(warmup, 1)
                return xp.where(step < warmup, warm, stairs())
            case "linear_warmup_cosine_lr":
                return xp.where(step < warmup, rising(within), cosine(step, config.max_steps))
            case "linear_warmup_step_lr":
                return xp.where(epoch == 0, rising(within), stairs())

    return rate


def decays_weight(params: Any) -> Any:
    """Tree of bools: True for leaves that weight decay pulls towards 0 (`runner_base.py`).

    Not those of fewer than two dimensions, nor with `bias`, `ln` or `bn` anywhere in their path. Position embeddings,
    class and query tokens do decay, and so do both halves of a LoRA.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: (
            len(leaf.shape) >= 2
            and not any(part in path_name(keys) for part in ("bias", "ln", "bn"))
        ),
        params,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW or Muon over `accum_grad_iters` batches. `update` needs `num_targets`: the batch's counted tokens.

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) replaces the kernel's momentum by the nearest
    orthogonal matrix, so that every direction of the input moves at the same speed; the bias goes by Adam (Nesterov).
    Neighbouring patches are strongly correlated, and Adam's steps per number mostly move their common direction. Its
    rate is a length in the spectral norm: another scale than AdamW's.

    An update that gathers several batches has the learning rate of its last one, as in the original.
    """
    by_batch = make_schedule(config)

    def schedule(count: Any) -> Any:
        return by_batch(_last_batch(config, count))

    if config.name == "muon":
        tx = optax.contrib.muon(
            schedule,
            beta=MUON_MOMENTUM,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays_weight,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
        )
    else:
        tx = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays_weight,
        )
    if config.accum_grad_iters == 1:
        return optax.with_extra_args_support(tx)
    return _accumulate(tx, config)


def _last_batch(config: OptimizerConfig, count: Any) -> Any:
    """The batch that completes update number `count` (both from 0)."""
    every = config.accum_grad_iters
    if config.accum_grads == "mean":
        return (count + 1) * every - 1
    per_epoch = config.epoch_steps // every
    return count // per_epoch * config.epoch_steps + (count % per_epoch + 1) * every - 1


class AccumulationState(NamedTuple):
    """What is gathered between two updates."""

    step: Int[Array, ""]
    """Batches seen in the whole run."""
    grads: Any
    weight: Float[Array, ""]
    inner: Any


def _accumulate(
    tx: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformationExtraArgs:
    """Hands every `accum_grad_iters`-th call on to `tx`; the calls between return zeros.

    (`optax.MultiSteps` weighs every batch alike and knows no epochs.)
    """
    mean = config.accum_grads == "mean"

    def init(params: Any) -> AccumulationState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AccumulationState(jnp.zeros((), jnp.int32), zeros, jnp.zeros(()), tx.init(params))

    def update(
        grads: Any, state: AccumulationState, params: Any = None, *, num_targets: Any, **_: Any
    ) -> tuple[Any, AccumulationState]:
        share = jnp.asarray(num_targets, jnp.float32) if mean else jnp.ones(())
        gathered = jax.tree.map(lambda old, new: old + share * new, state.grads, grads)
        weight = state.weight + share
        zeros = jax.tree.map(jnp.zeros_like, grads)

        def close() -> tuple[Any, AccumulationState]:
            scale = 1 / jnp.maximum(weight, 1) if mean else jnp.ones(())
            whole = jax.tree.map(lambda leaf: scale * leaf, gathered)
            updates, inner = tx.update(whole, state.inner, params)
            return updates, AccumulationState(state.step + 1, zeros, jnp.zeros(()), inner)

        def wait() -> tuple[Any, AccumulationState]:
            return zeros, AccumulationState(state.step + 1, gathered, weight, state.inner)

        place = state.step if mean else state.step % config.epoch_steps
        updates, after = jax.lax.cond((place + 1) % config.accum_grad_iters == 0, close, wait)
        return updates, after

    return optax.GradientTransformationExtraArgs(init, update)
