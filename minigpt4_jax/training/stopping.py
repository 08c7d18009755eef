"""Ctrl-C and SIGTERM: the step that is running is finished and saved.

Not for: saving (`checkpoints.py`), exit codes (`exits.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Stop:
    """Set by the first Ctrl-C or SIGTERM; the loop looks at it between two steps."""

    requested: bool = False


@contextlib.contextmanager
def stop_after_step() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM finish and save the current step; a second one stops at once, back to the last checkpoint."""
    stop = Stop()

    def handle(signum: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not in the main thread: the embedding program owns the signals
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
