"""Where the time of a run went, over all its restarts: `<workdir>/time.json`.

For: `Account`, and goodput, the share of a run's time in steps that still count. Not for: what a step says about itself
(`metrics.py`), or the time inside a step (`profiling.py`).

Every moment belongs to exactly one phase, so the phases add up to the time that the run's processes lived (from the
call of `train`; a machine that is down or a queue before it counts nothing). The original has no such account.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax

FILE = "time.json"
PHASES = {
    "init": "preparing",
    "compile": "compiling",
    "data_wait": "waiting for data",
    "step": "steps",
    "eval": "held-out samples",
    "checkpoint": "checkpoints",
    "lost": "steps done twice",
}
"""Phases, and how they are said. `lost` is the time of steps that a restart had to do again."""
WRITE_EVERY_S = 1.0
"""A process that is killed loses at most so much of the account."""


class Lap(NamedTuple):
    """Seconds between two looks at the account: in steps, and waiting for batches."""

    step_s: float
    wait_s: float


class Account:
    """Seconds by phase, those of earlier processes of the run included. A context manager; begins in `init`.

    Args:
        workdir: the run's folder; process 0 alone writes into it.
        clock: seconds, monotonic.
    """

    def __init__(self, workdir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = workdir / FILE, clock
        self._seconds = dict.fromkeys(PHASES, 0.0) | read_account(workdir)
        self._phase, self._since = "init", clock()
        self._written = self._since
        self._lap = Lap(self._seconds["step"], self._seconds["data_wait"])

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._count()
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ends
            self._write()

    def begin(self, phase: str) -> str:
        """From now on time counts as `phase`; returns the phase before. Writes the account now and then."""
        self._count()
        before, self._phase = self._phase, phase
        if self._since - self._written >= WRITE_EVERY_S:
            self._written = self._since
            with contextlib.suppress(OSError):  # a full disk: the next one may succeed
                self._write()
        return before

    @contextlib.contextmanager
    def spend(self, phase: str) -> Iterator[None]:
        """What is inside counts as `phase`."""
        before = self.begin(phase)
        try:
            yield
        finally:
            self.begin(before)

    def lap(self) -> Lap:
        """What went into steps and into waiting for their batches since the last call."""
        self._count()
        now = Lap(self._seconds["step"], self._seconds["data_wait"])
        found = Lap(now.step_s - self._lap.step_s, now.wait_s - self._lap.wait_s)
        self._lap = now
        return found

    def lose(self, seconds: float) -> None:
        """Steps that took so long are done again: they count nothing."""
        lost = min(seconds, self._seconds["step"])
        self._seconds["step"] -= lost
        self._seconds["lost"] += lost
        self._lap = self._lap._replace(step_s=self._lap.step_s - lost)

    def seconds(self) -> dict[str, float]:
        """By phase, up to now."""
        self._count()
        return dict(self._seconds)

    def goodput(self) -> float:
        """Share of all time that went into steps that count, 0 to 1."""
        found = self.seconds()
        return found["step"] / max(sum(found.values()), 1e-9)

    def summary(self) -> str:
        """One line for people."""
        found = self.seconds()
        total = max(sum(found.values()), 1e-9)
        shares = ", ".join(
            f"{said} {found[phase] / total:.1%}" for phase, said in PHASES.items() if found[phase]
        )
        return (
            f"Time: {total / 60:.1f} min with all restarts; {shares}. Goodput {self.goodput():.1%}."
        )

    def _count(self) -> None:
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._since = now

    def _write(self) -> None:
        if jax.process_index() != 0:
            return
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps({name: round(s, 3) for name, s in self._seconds.items()}))
        os.replace(beside, self._path)


def read_account(workdir: Path) -> dict[str, float]:
    """Seconds by phase of a run so far; empty where there is no account."""
    path = workdir / FILE
    if not path.exists():
        return {}
    found: dict[str, float] = json.loads(path.read_text())
    return found
