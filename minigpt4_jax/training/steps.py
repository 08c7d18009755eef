"""The steps of a run, one after the other: take one, write its numbers, save now and then, stop when asked.

Not for: what comes before the first step and after the last (`loop.py`), the arithmetic (`step.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.pipeline import Pipeline
from minigpt4_jax.exits import Stopped
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.account import Account
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.held_out import HeldOut
from minigpt4_jax.training.metrics import Metrics, Speed, StepSize
from minigpt4_jax.training.nonfinite import require_finite
from minigpt4_jax.training.optimizer import make_schedule
from minigpt4_jax.training.profiling import ProfileWindow
from minigpt4_jax.training.saving import Saver
from minigpt4_jax.training.state import TrainState
from minigpt4_jax.training.step import StepNumbers
from minigpt4_jax.training.stopping import Stop
from minigpt4_jax.training.together import of_all_processes
from minigpt4_jax.training.watchdog import Watchdog

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
    parts: Sequence[Part],
    meta: dict[str, Any],
    stop: Stop,
    watch: Watch,
) -> tuple[TrainState, int]:
    """Steps until the last one, or until a signal asks to stop (`Stopped`); what was done is saved either way.

    The numbers of a step are read when the next one was dispatched, so that the device never waits for the host; but
    before anything is saved.
    """
    workdir, max_steps, account = Path(config.workdir), config.optimizer.max_steps, watch.account
    compiled: set[tuple[tuple[int, ...], ...]] = set()
    taken: Taken | None = None
    saver = Saver(
        checkpoints,
        save_every=config.save_every,
        save_every_minutes=config.save_every_minutes,
        max_failed_saves=config.max_failed_saves,
    )
    with (
        _open_metrics(config, step, watch) as metrics,
        ProfileWindow(config.profile, workdir) as profile,
        Watchdog(config.watchdog_s) as watchdog,
    ):
        numbers_of = functools.partial(
            read_numbers, config, metrics=metrics, watchdog=watchdog, parts=parts
        )
        if _look_due(watch, step, metrics):
            _look(watch, step, state, metrics)
        saver.begin(step)
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
                numbers_of(taken)
            taken = Taken(step, batch, numbers)
            # Asked once: a stop that comes too late for this save waits for the next step.
            stopping = stop.decided()
            last = bool(stopping) or step == max_steps
            saving = last or saver.due(step)
            looking = _look_due(watch, step, metrics)
            if saving or looking:
                numbers_of(taken)
                taken = None
            if saving:
                save = saver.save_last if last else saver.save
                with account.spend("checkpoint"):
                    save(step, state, data_state=_position(batches), meta=meta)
            if stopping and step < max_steps:
                raise Stopped(stopping, step)  # a look that was due is made when the run goes on
            if looking:
                with watchdog.patient():
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


def _position(batches: Pipeline) -> dict[str, Any]:
    """In the global order, with the corrupt samples that all processes have met."""
    return batches.merge_states(of_all_processes(batches.get_state()))


def read_numbers(
    config: TrainConfig,
    taken: Taken,
    *,
    metrics: Metrics,
    watchdog: Watchdog,
    parts: Sequence[Part],
) -> None:
    """Waits for a step's numbers and writes them. Raises `UserError` for a loss or gradient that is none."""
    numbers = jax.device_get(taken.numbers)
    loss, grad_norm = float(numbers.loss), float(numbers.grad_norm)
    workdir = Path(config.workdir)
    require_finite(
        taken.step, loss=loss, grad_norm=grad_norm, batch=taken.batch, parts=parts, workdir=workdir
    )
    watchdog.beat(taken.step)
    metrics.write(
        taken.step,
        loss=loss,
        learning_rate=float(make_schedule(config.optimizer)(taken.step - 1)),
        grad_norm=grad_norm,
        image_token_std=float(numbers.image_token_std),
        size=StepSize(
            samples=config.data.batch_size,
            tokens=int(numbers.tokens),
            length=taken.batch["token_ids"].shape[1],
            targets=taken.batch["target_ids"].shape[1],
        ),
    )
