"""The thread that owns the model: jobs wait here, pass through the engine's slots, and hear what is written.

For: who is next, deadlines, cancelling, draining, and giving the engine up. Any thread may submit, cancel and ask; only
one ever touches the model. Not for: HTTP, JSON, asyncio; nor for what is done inside a step (`slots.py`).

Differs from the original, whose demo answers one visitor at a time in the web framework's threads.
"""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from minigpt4_jax.api import MiniGPT4
from minigpt4_jax.generation.engine import CompileProgress
from minigpt4_jax.serve_config import CompileBeside, FaultsConfig
from minigpt4_jax.serving.errors import ApiError, internal, timed_out, unavailable
from minigpt4_jax.serving.jobs import Failed, Job, Load, Observer
from minigpt4_jax.serving.register import Quiet, Register
from minigpt4_jax.serving.rows import Task
from minigpt4_jax.serving.slots import Slots
from minigpt4_jax.serving.watchdog import Clock, FaultWindow, Watchdog

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "broken", "stopped"]
JOIN_S = 8.0
"""How long `close` waits for its threads, in all. Only one that hangs in the device, or compiles a large program, takes
longer. With the time to drain (`faults.drain_s`, 30 s) and uvicorn's last words it stays under the 60 s that
deploy/serve/kubernetes.yaml gives before SIGKILL."""


class Scheduler:
    """Jobs in, events out.

    Args:
        model: nobody else may use it between `start` and `close`, but for `encoder.prepare` and conversations.
        max_waiting: jobs that may wait for a slot.
        beside: which programs are compiled behind the core, beside the jobs.
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
        beside: CompileBeside,
        faults: FaultsConfig,
        observer: Observer,
        on_fatal: Callable[[str], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self._engine, self._context = model.engine, model.context
        self._observer, self._on_fatal, self._clock = Quiet(observer), on_fatal, clock
        self._state: State = "starting"
        self._progress: CompileProgress | None = None
        self._faults = faults
        self._window = FaultWindow(
            max_faults=faults.max_faults, window_s=faults.faults_window_s, clock=clock
        )
        self._watchdog = Watchdog(
            self._stalled,
            alive=lambda: self._thread.is_alive(),
            on_gone=lambda: self._break("the engine's thread is gone"),
            stall_s=faults.stall_s,
            clock=clock,
        )
        self._jobs = Register(max_waiting=max_waiting, observer=self._observer, clock=clock)
        self._lock = self._jobs.lock
        self._slots = Slots(
            model,
            observer=self._observer,
            tell=self._jobs.tell,
            end=self._jobs.end,
            fault=self._fault,
            moved=self._watchdog.moved,
            clock=clock,
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._beside = beside
        self._compiler = threading.Thread(target=self._compile, name="compiler", daemon=True)

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
        """Starts the thread. It compiles what every request needs, telling `progress` on its way, and is ready; what
        else is compiled, is compiled beside it."""
        self._progress = progress
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job; from then on it is told everything through `job.emit`.

        Raises:
            ApiError: 503 unless ready; 429 where too many wait.
        """
        with self._lock:
            self._refuse_unless_ready()
            self._jobs.add(
                job,
                free=self._slots.free,
                searching=self._slots.searching,
                running=len(self._slots.tasks),
            )

    def cancel(self, job: Job) -> None:
        """Ends a job wherever it is; nothing is emitted any more, and its slots are free within one step. Does nothing
        for a job that is over."""
        with self._lock:
            task = self._jobs.tasks.get(job)
        if task is not None:
            self._jobs.end(task, "abort", None)

    def load(self) -> Load:
        """What is going on now."""
        with self._lock:
            waiting, tasks = len(self._jobs.waiting), self._slots.tasks
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
            programs_left=0 if self._beside == "none" else self._engine.programs_left,
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
                lambda: not self._jobs.tasks or self._state in ("broken", "stopped"), timeout_s
            )
            left, intact = list(self._jobs.tasks.values()), self._state == "draining"
        self._fail_all(left)
        return intact and not left

    def close(self) -> None:
        """Fails what is left with 503 and ends the threads, within `JOIN_S`. Unless it hangs the engine is free."""
        with self._lock:
            self._state = "stopped"
            left = list(self._jobs.tasks.values())
            self._lock.notify_all()
        self._fail_all(left)
        self._watchdog.stop()
        until_s = time.monotonic() + JOIN_S
        for thread in (self._thread, self._compiler):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, until_s - time.monotonic()))
                if thread.is_alive():
                    logger.error("The thread %s does not end; it is left behind.", thread.name)
        if not self._thread.is_alive():
            self._sweep()

    def _fail_all(self, tasks: list[Task]) -> None:
        for task in tasks:
            self._jobs.end(
                task, "abort", Failed(unavailable("The server shuts down; ask again later."))
            )

    def _refuse_unless_ready(self) -> None:
        if self._state == "starting":
            raise unavailable("The server is starting; try again in a moment.", retry_after_s=5)
        if self._state != "ready":
            raise unavailable("The server shuts down; ask again later.")

    # --- giving up ---

    def _fault(self) -> None:
        self._observer.faulted()
        if self._window.add():
            self._break(
                f"the engine failed more than {self._faults.max_faults} times within "
                f"{self._faults.faults_window_s:g} s"
            )

    def _stalled(self, seconds: float) -> None:
        faulthandler.dump_traceback(2, all_threads=True)  # to standard error: where it hangs
        self._break(f"the engine has work and has finished nothing for {seconds:.0f} s")

    def _break(self, reason: str) -> None:
        """Gives the engine up, on any thread: its own may hang in it."""
        with self._lock:
            if self._state in ("broken", "stopped"):
                return
            self._state = "broken"
            tasks, waiting = list(self._jobs.tasks.values()), set(self._jobs.waiting)
        logger.critical("The engine is given up: %s", reason)
        for task in tasks:
            error: ApiError = internal()
            if task in waiting:
                error = unavailable("The server is broken and ends; ask again later.")
            self._jobs.end(task, "error", Failed(error))
            self._jobs.forget(task)
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
            if self._beside != "none":
                self._compiler.start()
            self._watchdog.start()
            while self._await_work():
                self.turn()
        # Nothing is expected here: the engine ends its own faults. What comes through leaves it unknown, and ends the
        # thread whatever it is: SystemExit too, in silence.
        except BaseException as error:
            logger.exception("The engine's thread failed")
            self._break(f"the engine's thread failed ({type(error).__name__})")

    def prepare(self) -> bool:
        """Compiles the core and is ready; False where somebody closed meanwhile. For the thread, and for tests that
        are the thread."""

        def tell(done: int, total: int) -> None:
            if not self._living:
                raise _Closed
            if self._progress is not None:
                self._progress(done, total)

        try:
            self._engine.compile_core(tell)
        except _Closed:
            return False
        if self._beside == "all":
            self._engine.want_rest()
        with self._lock:
            if self._state == "starting":
                self._state = "ready"
            self._lock.notify_all()
            return self._state != "stopped"

    @property
    def _living(self) -> bool:
        return self._state not in ("broken", "stopped")

    def _compile(self) -> None:
        while self._living:
            try:
                self._engine.compile_wanted(lambda: self._living)
            # That size only makes requests cheaper; the core serves all of them.
            except Exception:
                logger.exception("Compiling another size failed; requests go on without it")

    def _await_work(self) -> bool:
        """Sleeps while there is nothing to do; False when the thread has to end."""
        with self._lock:
            while self._state in ("ready", "draining"):
                if self._jobs.waiting or self._jobs.over or self._slots.tasks:
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
        with self._lock:
            taken = self._jobs.take(self._slots.free, searching=self._slots.searching)
            self._slots.reserve(taken)
        if taken:
            self._slots.begin(taken)
            self._sweep()
        if self._slots.busy and self._living:
            self._slots.step()
            self._sweep()
        self._slots.check()

    def _expire(self) -> None:
        with self._lock:
            tasks = list(self._jobs.tasks.values())
        now = self._clock()
        for task in tasks:
            if task.job.deadline_s <= now:
                seconds = now - task.job.arrived_s
                text = f"The answer was not complete after {seconds:.0f} s, the time that a request has."
                self._jobs.end(task, "timeout", Failed(timed_out(text)))

    def _sweep(self) -> None:
        """Takes the jobs that are over out of the engine."""
        while self._jobs.over:
            task = self._jobs.over.popleft()
            self._slots.release(task)
            self._jobs.forget(task)


class _Closed(Exception):
    """Compiling ends: nobody waits for it any more."""
