"""A few threads for work that nobody can interrupt, and that strangers may make long.

For: decoding pictures and looking up names beside the event loop, never more at once than `num_threads`, so that memory
has a bound. Not for: what is done there (`pictures.py`, `fetch.py`). `concurrent.futures.ThreadPoolExecutor` does not
do: a thread that never comes back would keep its place for ever, and keep the process from ending, because the
interpreter waits for such threads.

Not in the original, which decodes in the request's own handler.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """`num_threads` daemon threads. Work that takes too long is given up: its thread no longer counts.

    A thread cannot be killed. One that was given up goes on, and another takes its place, so that the rest is served;
    when its work is done after all, it ends. No more than `num_threads` are replaced at a time, so that at most
    `2 * num_threads` pieces of work are in memory: beyond that, work waits until one of them comes back.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        """`name` is what the threads are called."""
        self._num_threads, self._name = num_threads, name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lost: set[Future[Any]] = set()
        self._live = 0
        self._closed = False
        with self._changed:
            for _ in range(num_threads):
                self._start_thread()

    @property
    def num_lost(self) -> int:
        """Threads that work on something that was given up."""
        return len(self._lost)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Any thread. What `work` returns or raises is in the future; `cancel` on it drops work that still waits."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("submit after close")
            self._waiting.append((future, work))
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def give_up(self, future: Future[Any]) -> bool:
        """Any thread: nobody waits for this work any more. Returns whether a thread had begun it and is not done."""
        with self._changed:
            if future.cancel() or future.done() or self._closed:
                return False
            self._lost.add(future)
            if len(self._lost) <= self._num_threads:
                self._start_thread()
            return True

    def close(self) -> None:
        """Drops what waits; waits for nobody."""
        with self._changed:
            self._closed = True
            for future, _ in list(self._waiting):
                future.cancel()
            self._changed.notify_all()

    def _forget(self, future: Future[Any]) -> None:
        """What was cancelled while it waited must not keep its bytes until a thread comes to it."""
        if future.cancelled():
            with self._changed:
                self._waiting = deque(each for each in self._waiting if each[0] is not future)

    def _start_thread(self) -> None:
        self._live += 1
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                future, work = self._waiting.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
            try:
                result = work()
            except (
                BaseException
            ) as error:  # whoever waits gets it, whatever it is; the thread lives on
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            with self._changed:
                self._lost.discard(future)
                if self._live - len(self._lost) > self._num_threads:  # another one has its place
                    self._live -= 1
                    return
            del future, work  # an idle thread holds no picture
