"""The steps of a run, one after the other: take one, write its numbers, save now and then, stop when asked.

Not for: what comes before the first step and after the last (`loop.py`), the arithmetic (`step.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.pipeline import Pipeline
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.metrics import Metrics
from minigpt4_jax.training.optimizer import make_schedule
from minigpt4_jax.training.state import TrainState
from minigpt4_jax.training.step import StepNumbers
from minigpt4_jax.training.stopping import Stop

TakeStep = Callable[[TrainState, Batch], tuple[TrainState, StepNumbers]]


def run_steps(
    config: TrainConfig,
    state: TrainState,
    step: int,
    take_step: TakeStep,
    batches: Pipeline,
    checkpoints: TrainCheckpoints,
    *,
    meta: dict[str, Any],
    stop: Stop,
) -> tuple[TrainState, int]:
    """Steps until the last one, or until a signal asks to stop; what was done is saved either way."""
    schedule = make_schedule(config.optimizer)
    max_steps = config.optimizer.max_steps
    with Metrics(
        Path(config.workdir),
        start_step=step,
        max_steps=max_steps,
        log_every=config.log_every,
        tensorboard=config.tensorboard,
    ) as metrics:
        while step < max_steps:
            state, numbers = take_step(state, next(batches))
            step += 1
            loss, grad_norm, image_token_std = map(float, jax.device_get(numbers))
            if not np.isfinite(loss):
                raise UserError(
                    f"The loss of step {step} is {loss}; expected a number. The last checkpoint is from before "
                    "it. Lower optimizer.init_lr and start in a new workdir."
                )
            metrics.write(
                step,
                loss=loss,
                learning_rate=float(schedule(step - 1)),
                grad_norm=grad_norm,
                image_token_std=image_token_std,
                samples=config.data.batch_size,
            )
            # Read once: a stop that comes too late for this save waits for the next step.
            stopping = stop.requested
            if step % config.save_every == 0 or step == max_steps or stopping:
                checkpoints.save(step, state, data_state=batches.get_state(), meta=meta)
            if stopping:
                break
    return state, step
