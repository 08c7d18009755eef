"""Ctrl-C and SIGTERM: the step that is running is finished and saved, by all processes of a run the same one.

A signal reaches one process; whether to stop is decided together, after every step, one step later (see
`together.Agreement`). (JAX's own `reached_preemption_sync_point` knows SIGTERM only,
and keeps a handler of its own for it from the start, which leaves a process that is still loading deaf.)

Not for: saving (`checkpoints.py`), which code a command ends with (`exits.py`).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax

from minigpt4_jax.exits import INTERRUPTED, PREEMPTED
from minigpt4_jax.training.together import Agreement

CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}
"""What a run ends with that a signal stopped. Of two, the larger counts: a person's Ctrl-C."""


class Stop:
    """Set by the first Ctrl-C or SIGTERM; the loop asks `decided()` after every step."""

    def __init__(self) -> None:
        self.wanted = 0
        """By this process: the code to end with, or 0."""
        self._agreement = Agreement() if jax.process_count() > 1 else None

    def decided(self) -> int:
        """The code to stop with now, or 0; the same in every process, each of which must call this after each step.

        Of one process, what it wants. Of several, what any of them wanted when the step before this one was done.
        """
        return self.wanted if self._agreement is None else self._agreement.after(self.wanted)


@contextlib.contextmanager
def stop_after_step() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM finish and save the current step; a second one stops at once, back to the last checkpoint.

    Beside other processes the second one ends this process as the system does it: Python does not get its turn while
    a step waits for a process that is gone.
    """
    stop = Stop()
    several = jax.process_count() > 1

    def handle(signum: int, frame: object) -> None:
        if stop.wanted:
            raise KeyboardInterrupt
        stop.wanted = CODES[signal.Signals(signum)]
        if several:
            for number in CODES:
                signal.signal(number, signal.SIG_DFL)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in CODES:
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not in the main thread: the embedding program owns the signals
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
