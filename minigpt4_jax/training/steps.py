"""The steps of a run, one after the other: take one, write its numbers, save now and then, stop when asked.

Not for: what comes before the first step and after the last (`loop.py`), the arithmetic (`step.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.pipeline import Pipeline
from minigpt4_jax.exits import Stopped
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.distributed import of_all_processes
from minigpt4_jax.training.metrics import Metrics
from minigpt4_jax.training.nonfinite import require_finite
from minigpt4_jax.training.optimizer import make_schedule
from minigpt4_jax.training.saving import Saver
from minigpt4_jax.training.state import TrainState
from minigpt4_jax.training.step import StepNumbers
from minigpt4_jax.training.stopping import Stop
from minigpt4_jax.training.watchdog import Watchdog

TakeStep = Callable[[TrainState, Batch], tuple[TrainState, StepNumbers]]


def run_steps(
    config: TrainConfig,
    state: TrainState,
    step: int,
    take_step: TakeStep,
    batches: Pipeline,
    checkpoints: TrainCheckpoints,
    *,
    parts: Sequence[Part],
    meta: dict[str, Any],
    stop: Stop,
) -> tuple[TrainState, int]:
    """Steps until the last one, or until a signal asks to stop (`Stopped`); what was done is saved either way."""
    schedule = make_schedule(config.optimizer)
    max_steps, workdir = config.optimizer.max_steps, Path(config.workdir)
    saver = Saver(
        checkpoints,
        save_every=config.save_every,
        save_every_minutes=config.save_every_minutes,
        max_failed_saves=config.max_failed_saves,
    )
    with (
        Metrics(
            workdir,
            start_step=step,
            max_steps=max_steps,
            log_every=config.log_every,
            tensorboard=config.tensorboard,
        ) as metrics,
        Watchdog(config.watchdog_s) as watchdog,
    ):
        while step < max_steps:
            batch = next(batches)
            state, numbers = take_step(state, batch)
            step += 1
            loss, grad_norm, image_token_std = map(float, jax.device_get(numbers))
            require_finite(
                step, loss=loss, grad_norm=grad_norm, batch=batch, parts=parts, workdir=workdir
            )
            watchdog.beat(step)
            metrics.write(
                step,
                loss=loss,
                learning_rate=float(schedule(step - 1)),
                grad_norm=grad_norm,
                image_token_std=image_token_std,
                samples=config.data.batch_size,
            )
            # Asked once: a stop that comes too late for this save waits for the next step.
            stopping = stop.decided()
            if stopping or step == max_steps:
                saver.save_last(step, state, data_state=_position(batches), meta=meta)
            elif saver.due(step):
                saver.save(step, state, data_state=_position(batches), meta=meta)
            if stopping and step < max_steps:
                raise Stopped(stopping, step)
    return state, step


def _position(batches: Pipeline) -> dict[str, Any]:
    """In the global order, with the corrupt samples that all processes have met."""
    return batches.merge_states(of_all_processes(batches.get_state()))
