"""What people and programs see of a run: a progress bar, a file of JSON lines and TensorBoard events.

The file has one line per step, and one per look at the held-out samples. A resumed run first drops the lines after its
checkpoint, so every step stands there exactly once and the losses of an interrupted run can be compared line by line
with an uninterrupted one. docs/metrics.md says what each number means.

Not for: where the time of the whole run went (`account.py`), pictures with captions (`held_out.py`). On several
processes the first one writes, and its numbers are those of all.
Differs from the original, which prints a smoothed loss and averages of its timers.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
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

from minigpt4_jax.training.account import Account
from minigpt4_jax.training.events import Events

FILE = "metrics.jsonl"
Speed = Callable[[int, int, float], Mapping[str, float]]
"""(length, targets, seconds) of a step to what it says of the devices: see `utilisation.py`."""


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """All complete lines of a run, of either kind; a last line that was cut off by a crash is left out."""
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


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of steps."""
    return [row for row in read_rows(workdir) if "loss" in row]


def read_held_out(workdir: Path) -> list[dict[str, Any]]:
    """The lines of looks at the held-out samples."""
    return [row for row in read_rows(workdir) if "held_out_loss" in row]


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


class StepSize(NamedTuple):
    """How large the batch of a step was, over all processes."""

    samples: int
    tokens: int
    """Real ones: pictures and padding-free text."""
    length: int
    """Of each row, padded, in tokens."""
    targets: int
    """Places for targets in each row, padded."""


class _Recent(NamedTuple):
    loss: float
    size: StepSize
    step_s: float
    wait_s: float


class Metrics:
    """Writes a JSON line per step and keeps a progress bar (or, away from a terminal, a line now and then).

    Args:
        workdir: where `metrics.jsonl` lies.
        account: gives the seconds of each step; told of the time of steps whose lines are dropped.
        start_step: steps that the checkpoint has; later lines in the file are dropped.
        log_every: steps between two updates of what people see; rates are over twice as many.
        tensorboard: write TensorBoard events as well.
        speed: what a step says of the devices, if that is known.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        account: Account,
        start_step: int,
        max_steps: int,
        log_every: int,
        tensorboard: bool,
        speed: Speed | None = None,
    ) -> None:
        self._account, self._speed = account, speed
        self._log_every, self._max_steps = log_every, max_steps
        self._recent: deque[_Recent] = deque(maxlen=2 * log_every)
        self._unwritten, self._said_full = b"", False
        rows = read_rows(workdir)
        self.looks = {
            row["step"] for row in rows if "held_out_loss" in row and row["step"] <= start_step
        }
        """Steps with a line about the held-out samples."""
        self.writes = jax.process_index() == 0
        """Whether this is the process that writes."""
        self.events: Events | None = None
        self._progress = make_progress(quiet=not self.writes)
        self._task: TaskID = self._progress.add_task(
            "training", total=max_steps, completed=start_step, numbers=""
        )
        if not self.writes:
            return
        dropped = [row for row in rows if row["step"] > start_step]
        account.lose(math.fsum(r.get("step_s", 0.0) - r.get("data_wait_s", 0.0) for r in dropped))
        path = workdir / FILE
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(r) + "\n" for r in rows if r["step"] <= start_step))
        os.replace(beside, path)
        if tensorboard:
            self.events = Events(workdir, start_step=start_step)
        self._file = path.open("ab", buffering=0)

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
        if not self.writes:
            return
        self._append(b"")
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            print(f"{lost} lines of {FILE} did not fit the disk and are lost.", flush=True)
        self._file.close()
        if self.events is not None:
            self.events.close()

    def write(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        image_token_std: float,
        size: StepSize,
    ) -> None:
        """Records a finished step: see `step.StepNumbers`."""
        lap = self._account.lap()
        step_s = max(lap.step_s + lap.wait_s, 1e-9)
        self._recent.append(_Recent(loss, size, step_s, lap.wait_s))
        spent = sum(one.step_s for one in self._recent)
        tokens = sum(one.size.tokens for one in self._recent)
        places = sum(one.size.samples * one.size.length for one in self._recent)
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "image_token_std": image_token_std,
            "samples_per_s": round(sum(one.size.samples for one in self._recent) / spent, 2),
            "tokens_per_s": round(tokens / spent, 1),
            "padding_efficiency": round(tokens / places, 4),
            "data_wait": round(sum(one.wait_s for one in self._recent) / spent, 4),
            "step_s": round(step_s, 6),
            "data_wait_s": round(lap.wait_s, 6),
            "time_left_s": round((self._max_steps - step) * spent / len(self._recent), 1),
            "goodput": round(self._account.goodput(), 4),
        }
        if self._speed is not None:
            row |= self._speed(size.length, size.targets, step_s)
        self._record(row, {f"train/{name}": row[name] for name in row if name != "step"})
        self._show(step, row)

    def write_held_out(self, step: int, *, loss: float, samples: int, tokens: int) -> None:
        """Records a look at the held-out samples: their mean loss over `tokens` targets."""
        row = {"step": step, "held_out_loss": loss, "samples": samples, "targets": tokens}
        self.looks.add(step)
        self._record(row, {"held_out/loss": loss})

    def say(self, text: str) -> None:
        """A line for people, from the process that writes."""
        if self.writes:
            print(text, flush=True)

    def _record(self, row: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        if not self.writes:
            return
        self._append(json.dumps(row).encode() + b"\n")
        if self.events is not None:
            for name, value in scalars.items():
                self.events.scalar(name, value, row["step"])

    def _append(self, line: bytes) -> None:
        """Writes what there is room for; the rest of it is tried again with the next line."""
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._said_full:
                print(f"The disk is full: lines of {FILE} wait until there is room.", flush=True)
            self._said_full = True

    def _show(self, step: int, row: Mapping[str, Any]) -> None:
        mean = sum(one.loss for one in self._recent) / len(self._recent)
        numbers = (
            f"loss {mean:.3f}  gradient {row['grad_norm']:.2g}  image tokens {row['image_token_std']:.2g}  "
            f"{row['samples_per_s']:.1f} samples/s  {row['tokens_per_s']:.0f} tokens/s  "
            f"data wait {row['data_wait']:.0%}"
        )
        if "utilisation" in row:
            numbers += f"  utilisation {row['utilisation']:.0%}"
        # A bar beside them must fit a terminal of 80 columns.
        short = f"loss {mean:.3f}  {row['samples_per_s']:.1f}/s  wait {row['data_wait']:.0%}"
        self._progress.update(self._task, completed=step, numbers=short)
        if not self._progress.console.is_terminal and step % self._log_every == 0:
            self.say(
                f"step {step}/{self._max_steps}  {numbers}  {row['time_left_s'] / 60:.1f} min left"
            )
