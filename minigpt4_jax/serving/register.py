"""Who waits, who is under way and who is over: every job between its submission and its last word.

For: what several threads change at once, under one lock, and telling each job its end exactly once. Not for: the engine
(`slots.py`), nor when anything happens (`scheduler.py`).
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any

from minigpt4_jax.serving.errors import overloaded
from minigpt4_jax.serving.jobs import Event, Job, JobRecord, Observer, Outcome
from minigpt4_jax.serving.rows import Task
from minigpt4_jax.serving.watchdog import Clock

logger = logging.getLogger(__name__)

EMIT_S = 1.0
"""How long a job's end waits for an event of it that is being emitted just then. An `emit` that takes longer hangs, and
the end goes on without it."""
RECENT_JOBS = 32
"""Jobs whose times `Retry-After` is estimated from."""


class Register:
    """All jobs. Any thread may call anything; what says so wants `lock` held.

    Args:
        max_waiting: jobs that may wait for a slot.
        observer: never raises.
    """

    def __init__(self, *, max_waiting: int, observer: Observer, clock: Clock) -> None:
        self.lock = threading.Condition()
        """Notified whenever a job comes, is over or is forgotten. Never held while a job is told something."""
        self.tasks: dict[Job, Task] = {}
        """Every job until it is forgotten."""
        self.waiting: deque[Task] = deque()
        """Jobs without slots, in their order."""
        self.over: deque[Task] = deque()
        """Jobs that were told their end, and may still have something in the engine."""
        self._max_waiting, self._observer, self._clock = max_waiting, observer, clock
        self._recent: deque[float] = deque(maxlen=RECENT_JOBS)

    def add(self, job: Job, *, free: int, searching: bool, running: int) -> None:
        """Puts a job behind those that wait; `lock` is held.

        Args:
            free: slots that nobody has, and that those who wait will be given.
            searching: whether a job of beams is under way; there is one at a time.
            running: jobs that have slots.

        Raises:
            ApiError: 429: `max_waiting` jobs would wait beside it for what somebody else has.
        """
        if job in self.tasks:
            raise ValueError(f"The job {job.id} was submitted already; expected a new one.")
        task = Task(job)
        if self._left_waiting(task, free, searching=searching) >= self._max_waiting:
            raise overloaded(
                f"{self._max_waiting} requests wait already, as many as may; try again later.",
                retry_after_s=self._retry_after_s(running),
            )
        self.tasks[job] = task
        self.waiting.append(task)
        self.lock.notify_all()

    def _left_waiting(self, task: Task, free: int, *, searching: bool) -> int:
        """Jobs that would still wait for what this one wants, slots or beams, after all that is free was given away."""
        begun = self._next(free, searching=searching)
        return sum(one.searches == task.searches and one not in begun for one in self.waiting)

    def _next(self, free: int, *, searching: bool) -> list[Task]:
        """The next jobs: of the caller who has the fewest slots, and of one caller in their order. Beams take no slots:
        who wants one does not wait for who wants the other."""
        left = list(self.waiting)
        if not left:
            return []
        waiting = {id(task) for task in left}
        held = Counter[Hashable]()
        for task in self.tasks.values():
            if id(task) not in waiting and not task.over:
                held[task.job.salt] += max(1, task.slots)
        found: list[Task] = []
        while True:
            open_now = [t for t in left if (not searching if t.searches else free > 0)]
            if not open_now:
                return found
            task = min(open_now, key=lambda t: held[t.job.salt])  # of several the first
            found.append(task)
            left.remove(task)
            held[task.job.salt] += max(1, task.slots)
            if task.searches:
                searching = True
            else:
                free -= task.slots

    def _retry_after_s(self, running: int) -> int:
        """When a place is likely to be free, in seconds: one is whenever one of the jobs side by side ends."""
        if not self._recent:
            return 1
        mean_s = sum(self._recent) / len(self._recent)
        return max(1, math.ceil(mean_s / max(1, running)))

    def take(self, free: int, *, searching: bool) -> list[Task]:
        """The next jobs, of the callers with the fewest slots first: all that slots are free for, and one that beams
        answer unless one of these is under way. `lock` is held."""
        taken = self._next(free, searching=searching)
        for task in taken:
            self.waiting.remove(task)
        return taken

    def tell(self, task: Task, event: Event) -> None:
        """Gives a job an event, unless it is over. One that cannot take it is ended."""
        with task.lock:
            if not task.over and not _emit(task, event):
                self.end(task, "abort", None)

    def end(self, task: Task, outcome: Outcome, event: Event | None) -> None:
        """Ends a job with its last event, or in silence; whoever comes first does, and once."""
        locked = task.lock.acquire(timeout=EMIT_S)
        try:
            if task.over:
                return
            task.ended_s, task.outcome = self._clock(), outcome
            if not locked:
                logger.error("The emit of request %s hangs; its end is not told.", task.job.id)
            elif event is not None:
                _emit(task, event)
        finally:
            if locked:
                task.lock.release()
        with self.lock:
            if task in self.waiting:
                self.waiting.remove(task)
            self.over.append(task)
            self.lock.notify_all()

    def forget(self, task: Task) -> None:
        """Takes out a job that is over and has nothing in the engine any more, and tells the observer, once."""
        record = task.record()
        with self.lock:
            if self.tasks.pop(task.job, None) is None:
                return
            if task.taken_s is not None:
                self._recent.append(record.total_s - record.queue_s)
            self.lock.notify_all()
        self._observer.finished(record)


def _emit(task: Task, event: Event) -> bool:
    try:
        task.job.emit(event)
    # Not ours: whatever it is, it is this job's alone.
    except Exception:
        logger.exception("The emit of request %s failed; the request is given up.", task.job.id)
        return False
    return True


class Quiet:
    """An observer whose mistakes are logged and end no request."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def _call(self, method: Callable[..., None], *args: Any) -> None:
        try:
            method(*args)
        # Not ours: figures may be missing, answers not.
        except Exception:
            logger.exception("The observer failed")

    def first_token(self, seconds: float) -> None:
        self._call(self._observer.first_token, seconds)

    def next_token(self, seconds: float) -> None:
        self._call(self._observer.next_token, seconds)

    def stepped(self, num_tokens: int) -> None:
        self._call(self._observer.stepped, num_tokens)

    def finished(self, record: JobRecord) -> None:
        self._call(self._observer.finished, record)

    def faulted(self) -> None:
        self._call(self._observer.faulted)
