"""A window of steps that `jax.profiler` records into `<workdir>/profile`, for TensorBoard or XProf.

Not for: seconds by phase (`account.py`), which every run has. The original has no profiler.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from minigpt4_jax.train_config import ProfileConfig

FOLDER = "profile"


class ProfileWindow:
    """Records steps `start_step` to `start_step + num_steps - 1` of this process. A context manager, closed on errors.

    A run that resumes inside the window records the rest of it. Only process 0 records.
    """

    def __init__(self, config: ProfileConfig, workdir: Path) -> None:
        first = max(config.start_step, 1)  # the first step has the number 1
        self._steps = range(first, first + config.num_steps)
        self._folder = workdir / FOLDER
        self._open = False

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Around everything that dispatches step `number`: names it in the recording."""
        if number not in self._steps or jax.process_index() != 0:
            return contextlib.nullcontext()
        if not self._open:
            jax.profiler.start_trace(self._folder)
            self._open = True
        annotation: contextlib.AbstractContextManager[Any] = jax.profiler.StepTraceAnnotation(
            "train", step_num=number
        )
        return annotation

    def done(self, number: int, numbers: Any) -> None:
        """After step `number` was dispatched; `numbers` are of its outputs: the window waits for its last step."""
        if self._open and number >= self._steps.stop - 1:
            jax.block_until_ready(numbers)
            self._stop()
            print(
                f"Steps {self._steps.start} to {number} are recorded in {self._folder}.", flush=True
            )

    def _stop(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
