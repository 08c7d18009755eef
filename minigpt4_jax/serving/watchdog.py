"""When an engine is given up: it fails too often, it has work and does not move, or its thread is gone.

For: these judgements, on a clock that tests may set. Not for: what follows from them (`scheduler.py`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds, as `time.monotonic`."""
LOOKS_PER_STALL = 20
"""How often the watchdog looks within the time that it allows: a stall is found at most a twentieth late."""
LATE_LOOKS = 2
"""A look that comes after so many times the time between two says that the whole process stood still (SIGSTOP, a paused
container, a machine without time for it), and nobody in it could move."""


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
    a step of a search or of its waiting for a compiler. Each of them has `stall_s`, in which time that passed between
    two looks far apart does not count. It says `rest` when it has nothing to do.

    Args:
        alive: whether the other thread is there; `on_gone()` is called once if it is not.
    """

    def __init__(
        self,
        on_stall: Callable[[float], None],
        *,
        alive: Callable[[], bool],
        on_gone: Callable[[], None],
        stall_s: float,
        clock: Clock,
    ) -> None:
        self._on_stall, self._alive, self._on_gone = on_stall, alive, on_gone
        self._stall_s, self._clock = stall_s, clock
        self._since: float | None = None
        # Of the watchdog's own thread: when it looked, what it saw, and how much of that time was no time.
        self._looked_s = 0.0
        self._seen: float | None = None
        self._lost_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-watchdog", daemon=True)

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
        self._looked_s = self._clock()
        self._thread.start()

    def stop(self) -> None:
        """Looks no more; does not wait for the thread."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._period_s):
            if not self._alive():
                self._on_gone()
                return
            stalled_s = self.look()
            if stalled_s > self._stall_s:
                self._on_stall(stalled_s)
                return

    @property
    def _period_s(self) -> float:
        return self._stall_s / LOOKS_PER_STALL

    def look(self) -> float:
        """What counts of `stalled_s`. For the thread, and for tests that are the thread."""
        since = self._since  # before the seconds, which are 0 if it moves between the two
        stalled_s, now_s = self.stalled_s, self._clock()
        gap_s, self._looked_s = now_s - self._looked_s, now_s
        if since != self._seen:
            self._seen, self._lost_s = since, 0.0
        if gap_s > LATE_LOOKS * self._period_s:
            self._lost_s = min(stalled_s, self._lost_s + gap_s)
        return stalled_s - self._lost_s
