"""The thread that owns the model: jobs wait here, pass through the engine's slots, and hear what is written.

For: who is next, deadlines, cancelling, draining, and giving the engine up. Any thread may submit, cancel and ask; only
one ever touches the model. Not for: HTTP, JSON, asyncio; nor for what is done inside a step (`slots.py`).

Differs from the original, whose demo answers one visitor at a time in the web framework's threads.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from minigpt4_jax.api import MiniGPT4
from minigpt4_jax.generation.engine import CompileProgress
from minigpt4_jax.serve_config import FaultsConfig
from minigpt4_jax.serving.errors import ApiError, internal, overloaded, timed_out, unavailable
from minigpt4_jax.serving.jobs import Event, Failed, Job, JobRecord, Load, Observer, Outcome
from minigpt4_jax.serving.rows import Task
from minigpt4_jax.serving.slots import Slots
from minigpt4_jax.serving.watchdog import Clock, FaultWindow, Watchdog

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "broken", "stopped"]
EMIT_S = 1.0
"""How long a job's end waits for an event of it that is being emitted just then. An `emit` that takes longer hangs, and
the end goes on without it."""
JOIN_S = 30.0
"""How long `close` waits for a thread. Only one that hangs in the device, or compiles a large program, takes longer."""
RECENT_JOBS = 32
"""Jobs whose times `Retry-After` is estimated from."""


class Scheduler:
    """Jobs in, events out.

    Args:
        model: nobody else may use it between `start` and `close`, but for `encoder.prepare` and conversations.
        max_waiting: jobs that may wait for a slot.
        observer: what it raises is logged and goes no further.
        on_fatal: called once, on any thread, when the engine is given up, with the reason: the state is "broken" then,
            and all jobs were told. Must not block.
        clock: seconds; also of the deadlines of jobs.
    """

    def __init__(
        self,
        model: MiniGPT4,
        *,
        max_waiting: int,
        faults: FaultsConfig,
        observer: Observer,
        on_fatal: Callable[[str], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self._engine, self._context = model.engine, model.context
        self._max_waiting, self._observer, self._on_fatal = max_waiting, observer, on_fatal
        self._clock = clock
        self._lock = threading.Condition()
        self._state: State = "starting"
        self._tasks: dict[Job, Task] = {}
        self._waiting: deque[Task] = deque()
        self._over: deque[Task] = deque()
        """Jobs that are over and may still have something in the engine."""
        self._progress: CompileProgress | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_JOBS)
        self._window = FaultWindow(
            max_faults=faults.max_faults, window_s=faults.faults_window_s, clock=clock
        )
        self._faults = faults
        self._watchdog = Watchdog(self._stalled, stall_s=faults.stall_s, clock=clock)
        self._slots = Slots(
            model,
            observer=_Quiet(observer),
            tell=self._tell,
            end=self._end,
            fault=self._fault,
            moved=self._watchdog.moved,
            clock=clock,
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._compiler = threading.Thread(target=self._compile_rest, name="compiler", daemon=True)

    # --- any thread ---

    @property
    def state(self) -> State:
        """Only when "ready" are jobs taken."""
        return self._state

    @property
    def leaks(self) -> int:
        """How often slots were found taken while no job was there. Anything but 0 is a mistake."""
        return self._slots.leaks

    def start(self, progress: CompileProgress | None = None) -> None:
        """Starts the thread. It compiles what every request needs, telling `progress` on its way, and is ready; the
        other sizes are compiled beside it."""
        self._progress = progress
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job; from then on it is told everything through `job.emit`.

        Raises:
            ApiError: 503 unless ready; 429 where too many wait.
        """
        with self._lock:
            self._refuse_unless_ready()
            if job in self._tasks:
                raise ValueError(f"The job {job.id} was submitted already; expected a new one.")
            if self._left_waiting() >= self._max_waiting:
                raise overloaded(
                    f"{self._max_waiting} requests wait already, as many as may; try again later.",
                    retry_after_s=self._retry_after_s(),
                )
            task = Task(job)
            self._tasks[job] = task
            self._waiting.append(task)
            self._lock.notify_all()

    def cancel(self, job: Job) -> None:
        """Ends a job wherever it is; nothing is emitted any more, and its slots are free within one step. Does nothing
        for a job that is over."""
        with self._lock:
            task = self._tasks.get(job)
        if task is not None:
            self._end(task, "abort", None)

    def load(self) -> Load:
        """What is going on now."""
        with self._lock:
            waiting, tasks = len(self._waiting), self._slots.tasks
        running = [g for task in tasks for g in task.handles if g.slot >= 0]
        used = sum(generation.length + len(generation.ids) for generation in running)
        num_slots = self._engine.num_slots
        return Load(
            waiting=waiting,
            running=len(tasks),
            busy_slots=len(running),
            num_slots=num_slots,
            cache_usage=used / (num_slots * self._context),
            stalled_s=self._watchdog.stalled_s,
        )

    def drain(self, timeout_s: float) -> bool:
        """Takes no more jobs and waits until all are answered. What is left after `timeout_s` fails with 503.

        Returns:
            Whether everything was answered.
        """
        with self._lock:
            if self._state in ("starting", "ready"):
                self._state = "draining"
            self._lock.wait_for(
                lambda: not self._tasks or self._state in ("broken", "stopped"), timeout_s
            )
            left, intact = list(self._tasks.values()), self._state == "draining"
        self._fail_all(left)
        return intact and not left

    def close(self) -> None:
        """Fails what is left with 503 and ends the threads. The engine is free then, unless it hangs."""
        with self._lock:
            self._state = "stopped"
            left = list(self._tasks.values())
            self._lock.notify_all()
        self._fail_all(left)
        self._watchdog.stop()
        for thread in (self._thread, self._compiler):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(JOIN_S)
                if thread.is_alive():
                    logger.error("The thread %s does not end; it is left behind.", thread.name)
        if not self._thread.is_alive():
            self._sweep()

    def _fail_all(self, tasks: list[Task]) -> None:
        for task in tasks:
            self._end(task, "abort", Failed(unavailable("The server shuts down; ask again later.")))

    def _refuse_unless_ready(self) -> None:
        if self._state == "starting":
            raise unavailable("The server is starting; try again in a moment.", retry_after_s=5)
        if self._state != "ready":
            raise unavailable("The server shuts down; ask again later.")

    def _left_waiting(self) -> int:
        """Jobs that would still wait after all free slots were given away."""
        free, left = self._slots.free, 0
        for task in self._waiting:
            if left or task.searches or free <= 0:
                left += 1
            free -= task.slots
        return left

    def _retry_after_s(self) -> int:
        """When a place in the queue is likely to be free: jobs side by side end so often."""
        if not self._recent:
            return 1
        mean_s = sum(self._recent) / len(self._recent)
        return max(1, math.ceil(mean_s / max(1, len(self._slots.tasks))))

    # --- telling, ending ---

    def _tell(self, task: Task, event: Event) -> None:
        with task.lock:
            if not task.over and not _emit(task, event):
                self._end(task, "abort", None)

    def _end(self, task: Task, outcome: Outcome, event: Event | None) -> None:
        """Once for each job, whoever is first; on any thread."""
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
        with self._lock:
            if task in self._waiting:
                self._waiting.remove(task)
            self._over.append(task)
            self._lock.notify_all()

    def _forget(self, task: Task) -> None:
        with self._lock:
            known = self._tasks.pop(task.job, None)
            record = task.record()
            if known is not None and task.taken_s is not None:
                self._recent.append(record.total_s - record.queue_s)
            self._lock.notify_all()
        if known is not None:
            _Quiet(self._observer).finished(record)

    def _fault(self) -> None:
        _Quiet(self._observer).faulted()
        if self._window.add():
            self._break(
                f"the engine failed more than {self._faults.max_faults} times within "
                f"{self._faults.faults_window_s:g} s"
            )

    def _stalled(self, seconds: float) -> None:
        self._break(f"the engine has work and has finished nothing for {seconds:.0f} s")

    def _break(self, reason: str) -> None:
        """Gives the engine up, on any thread: its own may hang in it."""
        with self._lock:
            if self._state in ("broken", "stopped"):
                return
            self._state = "broken"
            tasks, waiting = list(self._tasks.values()), set(self._waiting)
        logger.critical("The engine is given up: %s", reason)
        for task in tasks:
            error: ApiError = internal()
            if task in waiting:
                error = unavailable("The server is broken and ends; ask again later.")
            self._end(task, "error", Failed(error))
            self._forget(task)
        self._watchdog.stop()
        try:
            self._on_fatal(reason)
        # Not ours, and nobody is left who could be told.
        except Exception:
            logger.exception("on_fatal failed")

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            if not self.prepare():
                return
            self._compiler.start()
            self._watchdog.start()
            while self._await_work():
                self.turn()
        # Nothing is expected here: the engine ends its own faults. What comes through leaves it unknown.
        except Exception as error:
            logger.exception("The engine's thread failed")
            self._break(f"the engine's thread failed ({type(error).__name__})")

    def prepare(self) -> bool:
        """Compiles the core and is ready; False where somebody closed meanwhile. For the thread, and for tests that
        are the thread."""

        def tell(done: int, total: int) -> None:
            self._go_on()
            if self._progress is not None:
                self._progress(done, total)

        try:
            self._engine.compile_core(tell)
        except _Closed:
            return False
        with self._lock:
            if self._state == "starting":
                self._state = "ready"
            self._lock.notify_all()
            return self._state != "stopped"

    def _go_on(self) -> None:
        if self._state in ("broken", "stopped"):
            raise _Closed

    def _compile_rest(self) -> None:
        try:
            self._engine.compile_rest(lambda _done, _total: self._go_on())
        except _Closed:
            pass
        # Those sizes only make requests cheaper; the core serves all of them.
        except Exception:
            logger.exception("Compiling the other sizes failed; requests go on without them")

    def _await_work(self) -> bool:
        """Sleeps while there is nothing to do; False when the thread has to end."""
        with self._lock:
            while self._state in ("ready", "draining"):
                if self._waiting or self._over or self._slots.tasks:
                    self._watchdog.moved()
                    return True
                self._watchdog.rest()
                self._lock.wait()
            self._watchdog.rest()
            return False

    def turn(self) -> None:
        """One round: who is over leaves, who is next comes, and all that is in the engine goes one step on."""
        self._expire()
        self._sweep()
        taken = self._take()
        if taken:
            self._slots.begin(taken)
            self._sweep()
        if self._slots.busy:
            self._slots.step()
            self._sweep()
        self._slots.check()

    def _expire(self) -> None:
        with self._lock:
            tasks = list(self._tasks.values())
        now = self._clock()
        for task in tasks:
            if task.job.deadline_s <= now:
                seconds = now - task.job.arrived_s
                text = f"The answer was not complete after {seconds:.0f} s, the time that a request has."
                self._end(task, "timeout", Failed(timed_out(text)))

    def _sweep(self) -> None:
        """Takes the jobs that are over out of the engine."""
        while self._over:
            task = self._over.popleft()
            self._slots.release(task)
            self._forget(task)

    def _take(self) -> list[Task]:
        """The next jobs in their order: all that slots are free for, or one that beams answer."""
        taken: list[Task] = []
        with self._lock:
            free = self._slots.free
            while self._waiting:
                head = self._waiting[0]
                if head.searches:
                    if not taken:
                        taken.append(self._waiting.popleft())
                    break
                if free <= 0:
                    break
                taken.append(self._waiting.popleft())
                free -= head.slots
            self._slots.reserve(taken)
        return taken


class _Closed(Exception):
    """Compiling ends: nobody waits for it any more."""


def _emit(task: Task, event: Event) -> bool:
    try:
        task.job.emit(event)
    # Not ours: whatever it is, it is this job's alone.
    except Exception:
        logger.exception("The emit of request %s failed; the request is given up.", task.job.id)
        return False
    return True


class _Quiet:
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
