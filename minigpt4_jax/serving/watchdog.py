"""When an engine is given up: it fails too often, or it has work and does not move.

For: the two judgements, on a clock that tests may set. Not for: what follows from them (`scheduler.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds, as `time.monotonic`."""
LOOKS_PER_STALL = 20
"""How often the watchdog looks within the time that it allows: a stall is found at most a twentieth late."""


class FaultWindow:
    """Counts faults that are not older than `window_s`."""

    def __init__(self, *, max_faults: int, window_s: float, clock: Clock) -> None:
        self._max, self._window_s, self._clock = max_faults, window_s, clock
        self._times: deque[float] = deque()

    def add(self) -> bool:
        """Notes a fault; says whether there are more than `max_faults` now."""
        now = self._clock()
        self._times.append(now)
        while now - self._times[0] > self._window_s:
            self._times.popleft()
        return len(self._times) > self._max


class Watchdog:
    """A thread that looks whether another one moves, and calls `on_stall(seconds)` once if it does not.

    The other one says `moved` whenever it has finished a piece of work: a step, the encoding of a batch of pictures,
    the search of one job with its beams. Each of them, the compile that a search may begin with included, has
    `stall_s`. It says `rest` when it has nothing to do.
    """

    def __init__(self, on_stall: Callable[[float], None], *, stall_s: float, clock: Clock) -> None:
        self._on_stall, self._stall_s, self._clock = on_stall, stall_s, clock
        self._since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def moved(self) -> None:
        """Work was finished, or begins now."""
        self._since = self._clock()

    def rest(self) -> None:
        """There is no work."""
        self._since = None

    @property
    def stalled_s(self) -> float:
        """Seconds of work in which nothing was finished; 0 without work."""
        since = self._since
        return 0.0 if since is None else max(0.0, self._clock() - since)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Looks no more; does not wait for the thread."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._stall_s / LOOKS_PER_STALL):
            stalled_s = self.stalled_s
            if stalled_s > self._stall_s:
                self._on_stall(stalled_s)
                return
