"""When a training run saves, and what it does when the disk refuses: it goes on, and tries again.

For: `Saver`, which the step loop asks after each step. Not for: what a checkpoint is (`checkpoints.py`).

A save copies the state to the host and is written while the next steps run. A failed one (no room, no permission, a
disk that is gone) costs nothing but itself: what it left is removed, the older checkpoints stay, and the next try comes
after a minute, then two, four and so on. Differs from the original, which saves once an epoch and dies of a full disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax

from minigpt4_jax.checkpoint import CheckpointError
from minigpt4_jax.config import UserError
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.distributed import is_first_process
from minigpt4_jax.training.state import TrainState
from minigpt4_jax.training.together import Agreement, any_process

RETRY_S = 60.0
"""After the first failed save; twice as long after each further one."""
_log = logging.getLogger(__name__)


class Saver:
    """Decides when to save and survives failures. All processes of a run call the same methods at the same steps.

    Args:
        checkpoints: where to.
        save_every: steps between two saves.
        save_every_minutes: and so many minutes after the start of the last one; 0: by steps only.
        max_failed_saves: in a row; then the run stops.
        clock: seconds; only that of process 0 counts.
    """

    def __init__(
        self,
        checkpoints: TrainCheckpoints,
        *,
        save_every: int,
        save_every_minutes: float,
        max_failed_saves: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoints, self._clock = checkpoints, clock
        self._save_every, self._every_s = save_every, save_every_minutes * 60
        self._max_failed = max_failed_saves
        self._last_s = clock()
        self._retry_s: float | None = None
        self._due = False
        self._started: int | None = None
        self._failed = 0
        self._agreement = Agreement() if jax.process_count() > 1 else None

    def wants_save(self, step: int) -> bool:
        """Whether it is time to save `step`, as process 0 sees it: the others do as it says. Ask once a step."""
        now = self._clock()
        self._due |= step % self._save_every == 0
        self._due |= 0 < self._every_s <= now - self._last_s
        if self._retry_s is not None:
            return now >= self._retry_s
        return self._due and not self._checkpoints.busy

    def begin(self, step: int) -> None:
        """Before the first step, which is the one after `step`: else several processes could not save it."""
        if self._agreement is not None:
            self.due(step)

    def due(self, step: int) -> bool:
        """`wants_save` of process 0, on all processes; to be asked after every step.

        Where there are several, process 0 says a step ahead what it wants, so that no step waits for its word.

        Raises:
            UserError: too many saves in a row have failed.
        """
        if self._agreement is not None:
            wish = is_first_process() and self.wants_save(step + 1)
            if wish:
                self._begin()
            return bool(self._agreement.after(int(wish)))
        if not self._checkpoints.busy:
            self._finish()
        return self.wants_save(step)

    def save(
        self, step: int, state: TrainState, *, data_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Starts a save, and returns when the state is copied: it may be donated. A failure is said and counted.

        When the save before turns out to have failed only now, the next try comes after its pause.

        Raises:
            UserError: too many saves in a row have failed, or the state is not that of `step`.
        """
        if self._finish():
            self._start(step, state, data_state=data_state, meta=meta)

    def save_last(
        self, step: int, state: TrainState, *, data_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Saves and waits until it is on disk: nothing comes after that could try again.

        Raises:
            UserError: it could not be written, or the state is not that of `step`.
        """
        self._finish()
        self._start(step, state, data_state=data_state, meta=meta, last=True)
        self._finish(last=True)

    def _begin(self) -> None:
        self._due, self._retry_s, self._last_s = False, None, self._clock()

    def _start(
        self,
        step: int,
        state: TrainState,
        *,
        data_state: dict[str, Any],
        meta: dict[str, Any],
        last: bool = False,
    ) -> None:
        held = int(state.step)
        if held != step:
            raise UserError(
                f"The state holds step {held}, expected {step}: the loss of an earlier step was not a number. It is "
                "not saved; the last checkpoint is from before it."
            )
        if self._agreement is None:
            self._begin()
        if self._survives(
            step,
            lambda: self._checkpoints.save(step, state, data_state=data_state, meta=meta),
            last=last,
        ):
            self._started = step

    def _finish(self, *, last: bool = False) -> bool:
        """Waits for the save on its way, if there is one. Returns whether there is none that failed."""
        if self._started is None:
            return True
        step, self._started = self._started, None
        if not self._survives(step, self._checkpoints.wait_until_finished, last=last):
            return False
        self._failed = 0
        return True

    def _survives(self, step: int, action: Callable[[], None], *, last: bool) -> bool:
        """Runs a part of a save. A failure on any process is one on all: what is left is removed, and counted.

        Raises `UserError` where there is no further try: the `last` save, or too many in a row that failed.
        """
        problem: Exception | None = None
        try:
            action()
        except (CheckpointError, OSError) as error:
            problem = error
        if not any_process(problem is not None):
            return True
        problem = problem or CheckpointError("Another process failed; its message says why.")
        self._checkpoints.discard_unfinished()
        self._failed += 1
        told = f"The checkpoint of step {step} could not be written. {problem}"
        if last or self._failed >= self._max_failed:
            newest = self._checkpoints.latest_step
            raise UserError(
                f"{told} Failed in a row: {self._failed} (max_failed_saves={self._max_failed}). "
                + (
                    "There is no older checkpoint."
                    if newest is None
                    else f"The newest one is of step {newest}, where the same command goes on."
                )
            ) from problem
        wait_s = RETRY_S * 2 ** (self._failed - 1)
        self._retry_s = self._clock() + wait_s
        told += (
            f" Training goes on and tries again in {wait_s:.0f} s (failed in a row: {self._failed}; at "
            f"{self._max_failed} the run stops)."
        )
        _log.warning("%s", told)
        print(told, flush=True)
        return False
