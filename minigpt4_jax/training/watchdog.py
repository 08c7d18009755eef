"""A thread that looks whether steps still finish, and prints where every thread stands when none does.

For: `Watchdog`. Not for: ending a run. It never does: a slow disk or a long compilation is nobody's fault, and whoever
reads the stacks knows better.
Differs from the original, which hangs in silence.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import IO

PATIENCE = 5.0
"""The limit is so many times as long for the first step, which compiles, and inside `patient`."""


class Watchdog:
    """Prints all stacks when no step finishes for `limit_s`, again after twice the time, and so on until one does.

    A context manager around the step loop.

    Args:
        limit_s: seconds; 0: never.
        file: with a file number (`faulthandler` writes to that); standard error.
    """

    def __init__(self, limit_s: float, *, file: IO[str] | None = None) -> None:
        self._limit_s, self._file = limit_s, file or sys.__stderr__
        self._changed = threading.Condition()
        self._stopped = False
        self._step: int | None = None
        self._patience = PATIENCE
        self._since_s = time.monotonic()
        self._printed = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._since_s = time.monotonic()
        if self._limit_s and self._file is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int) -> None:
        """Step `step` is finished."""
        with self._changed:
            self._step, self._patience = step, 1.0
            self._restart()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Around what may take long between two steps: an evaluation, new compilations."""
        with self._changed:
            before, self._patience = self._patience, PATIENCE
            self._restart()
        try:
            yield
        finally:
            with self._changed:
                self._patience = before
                self._restart()

    def _restart(self) -> None:
        self._since_s, self._printed = time.monotonic(), 0
        self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                # 1, 3, 7 ... limits after the last sign of life: the waits double.
                due_s = self._since_s + self._limit_s * self._patience * (
                    2 ** (self._printed + 1) - 1
                )
                left_s = due_s - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                else:
                    self._printed += 1
                    self._print()

    def _print(self) -> None:
        assert self._file is not None
        last = "No step has" if self._step is None else f"Since step {self._step} none has"
        silent_s = time.monotonic() - self._since_s
        self._file.write(
            f"{last} finished for {silent_s:.0f} s (watchdog_s={self._limit_s:g}). The run goes on; this is where its "
            "threads stand:\n"
        )
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
