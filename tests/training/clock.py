"""A clock that goes when it is told to."""

from __future__ import annotations


class Clock:
    """Seconds since its start; stands in for `time.monotonic`."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def pass_s(self, seconds: float) -> None:
        """Lets time go by."""
        self._now += seconds
