"""What people and programs see of a run: a progress bar, a file of JSON lines and, if asked for, TensorBoard events.

The file has one line per step. A resumed run first drops the lines after its checkpoint, so every step stands there
exactly once and the losses of an interrupted run can be compared line by line with an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from minigpt4_jax.config import UserError
from minigpt4_jax.training.lines import LineFile

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
"""The folder of the event files."""


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All complete lines of a run; a last line that was cut off by a crash is left out."""
    path = workdir / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def make_progress(*, quiet: bool = False) -> Progress:
    """The project's progress bar: what, how far, numbers, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
        refresh_per_second=2,
    )


def make_event_writer(workdir: Path, *, start_step: int) -> Any:
    """A TensorBoard writer in `<workdir>/tensorboard`; what an earlier run wrote after `start_step` is hidden.

    Raises `UserError` where the `tensorboard` extra is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard is true and the library that writes its files is not installed; expected tensorboardX. "
            "pip install 'minigpt4_jax[tensorboard]', or set tensorboard=false."
        ) from error
    # The name of a file has only the second in it: the step keeps two quick runs apart.
    return SummaryWriter(
        str(workdir / EVENTS), purge_step=start_step + 1, filename_suffix=f".{start_step}"
    )


class Metrics:
    """Writes one JSON line per step and keeps a progress bar (or, away from a terminal, a line now and then).

    Args:
        workdir: where `metrics.jsonl` lies.
        start_step: steps that the checkpoint has; later lines in the file are dropped.
        log_every: steps between two updates of what people see.
        tensorboard: write TensorBoard events as well.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        max_steps: int,
        log_every: int,
        tensorboard: bool = False,
    ) -> None:
        self._events = make_event_writer(workdir, start_step=start_step) if tensorboard else None
        kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
        path = workdir / FILE
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(beside, path)
        self._file = LineFile(path)
        self._log_every = log_every
        self._max_steps = max_steps
        self._progress = make_progress()
        self._task: TaskID = self._progress.add_task(
            "training", total=max_steps, completed=start_step, numbers=""
        )
        self._recent: list[tuple[float, int, float]] = []

    def __enter__(self) -> Metrics:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        image_token_std: float,
        samples: int,
    ) -> None:
        """Records a finished step: see `step.StepNumbers`; `samples` is the size of its batch."""
        now = time.perf_counter()
        self._recent = [*self._recent[-(2 * self._log_every) :], (now, samples, loss)]
        first = self._recent[0][0]
        rate = (
            sum(count for _, count, _ in self._recent[1:]) / (now - first) if now > first else 0.0
        )
        row = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "image_token_std": image_token_std,
            "samples_per_s": round(rate, 2),
        }
        self._file.write(json.dumps(row))
        if self._events is not None:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(f"train/{name}", value, step)
        mean = sum(value for _, _, value in self._recent) / len(self._recent)
        numbers = f"loss {mean:.3f}  gradient {grad_norm:.2g}  image tokens {image_token_std:.2g}  {rate:.1f} samples/s"
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self._progress.console.is_terminal and step % self._log_every == 0:
            left = (self._max_steps - step) * samples / rate if rate else float("nan")
            print(f"step {step}/{self._max_steps}  {numbers}  {left / 60:.1f} min left", flush=True)
