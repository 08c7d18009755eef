"""The steps of a run, one after the other: take one, write its numbers, save now and then, stop when asked.

Not for: what comes before the first step and after the last (`loop.py`), the arithmetic (`step.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.pipeline import Pipeline
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.account import Account
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.held_out import HeldOut
from minigpt4_jax.training.metrics import Metrics, Speed, StepSize
from minigpt4_jax.training.optimizer import make_schedule
from minigpt4_jax.training.profiling import ProfileWindow
from minigpt4_jax.training.state import TrainState
from minigpt4_jax.training.step import StepNumbers
from minigpt4_jax.training.stopping import Stop

TakeStep = Callable[[TrainState, Batch], tuple[TrainState, StepNumbers]]


class Taken(NamedTuple):
    """A step that was dispatched and whose numbers are not read yet."""

    step: int
    batch: Batch
    numbers: StepNumbers


class Watch(NamedTuple):
    """What looks at a run while it goes on."""

    account: Account
    speed: Speed | None
    held_out: HeldOut | None


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
    watch: Watch,
) -> tuple[TrainState, int]:
    """Steps until the last one, or until a signal asks to stop; what was done is saved either way.

    The numbers of a step are read when the next one was dispatched, so that the device never waits for the host; but
    before anything is saved.
    """
    workdir, max_steps, account = Path(config.workdir), config.optimizer.max_steps, watch.account
    compiled: set[tuple[tuple[int, ...], ...]] = set()
    taken: Taken | None = None
    with (
        _open_metrics(config, step, watch) as metrics,
        ProfileWindow(config.profile, workdir) as profile,
    ):
        if _look_due(watch, step, metrics):
            _look(watch, step, state, metrics)
        while step < max_steps:
            with account.spend("data_wait"):
                batch = next(batches)
            step += 1
            shape = (batch["token_ids"].shape, batch["target_ids"].shape)
            with account.spend("step" if shape in compiled else "compile"), profile.step(step):
                state, numbers = take_step(state, batch)
            compiled.add(shape)
            profile.done(step, numbers)
            if taken is not None:
                read_numbers(config, taken, metrics)
            taken = Taken(step, batch, numbers)
            # Read once: a stop that comes too late for this save waits for the next step.
            stopping = stop.requested
            saving = step % config.save_every == 0 or step == max_steps or stopping
            looking = _look_due(watch, step, metrics)
            if saving or looking:
                read_numbers(config, taken, metrics)
                taken = None
            if saving:
                with account.spend("checkpoint"):
                    checkpoints.save(step, state, data_state=batches.get_state(), meta=meta)
            if stopping:
                break  # a look that was due is made when the run goes on
            if looking:
                _look(watch, step, state, metrics)
    return state, step


def _open_metrics(config: TrainConfig, step: int, watch: Watch) -> Metrics:
    return Metrics(
        Path(config.workdir),
        account=watch.account,
        start_step=step,
        max_steps=config.optimizer.max_steps,
        log_every=config.log_every,
        tensorboard=config.tensorboard,
        speed=watch.speed,
    )


def _look_due(watch: Watch, step: int, metrics: Metrics) -> bool:
    return watch.held_out is not None and watch.held_out.due(step, metrics)


def _look(watch: Watch, step: int, state: TrainState, metrics: Metrics) -> None:
    assert watch.held_out is not None
    with watch.account.spend("eval"):
        watch.held_out.look(step, state.projection, metrics)


def read_numbers(config: TrainConfig, taken: Taken, metrics: Metrics) -> None:
    """Waits for a step's numbers and writes them. Raises `UserError` for a loss that is none."""
    numbers = jax.device_get(taken.numbers)
    loss = float(numbers.loss)
    if not np.isfinite(loss):
        raise UserError(
            f"The loss of step {taken.step} is {loss}; expected a number. The last checkpoint is from before "
            "it. Lower optimizer.init_lr and start in a new workdir."
        )
    metrics.write(
        taken.step,
        loss=loss,
        learning_rate=float(make_schedule(config.optimizer)(taken.step - 1)),
        grad_norm=float(numbers.grad_norm),
        image_token_std=float(numbers.image_token_std),
        size=StepSize(
            samples=config.data.batch_size,
            tokens=int(numbers.tokens),
            length=taken.batch["token_ids"].shape[1],
            targets=taken.batch["target_ids"].shape[1],
        ),
    )
