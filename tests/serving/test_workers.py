"""`minigpt4_jax.serving.workers`: threads whose work may never end."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from minigpt4_jax.serving.workers import Workers

WAIT_S = 60.0  # generous: only a test that fails waits so long


@pytest.fixture
def forever() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def stuck(entered: threading.Semaphore, forever: threading.Event) -> int:
    entered.release()
    assert forever.wait(WAIT_S)
    return 7


def threads(name: str) -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == name]


def test_results_and_errors_come_back() -> None:
    workers = Workers(2, name="a")
    assert [workers.submit(lambda i=i: i * i).result(WAIT_S) for i in range(5)] == [0, 1, 4, 9, 16]
    failing = workers.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(WAIT_S)
    assert workers.submit(lambda: 1).result(WAIT_S) == 1
    workers.close()


def test_a_thread_that_was_given_up_is_replaced_and_ends_when_it_comes_back(
    forever: threading.Event,
) -> None:
    workers, entered = Workers(1, name="b"), threading.Semaphore(0)
    lost = workers.submit(lambda: stuck(entered, forever))
    assert entered.acquire(timeout=WAIT_S)
    waiting = workers.submit(lambda: 1)
    assert workers.give_up(lost)
    assert waiting.result(WAIT_S) == 1
    assert (workers.num_lost, len(threads("b"))) == (1, 2)
    first = threads("b")[0]
    forever.set()
    assert lost.result(WAIT_S) == 7
    first.join(WAIT_S)
    assert not first.is_alive()
    assert (workers.num_lost, len(threads("b"))) == (0, 1)
    assert workers.submit(lambda: 2).result(WAIT_S) == 2
    workers.close()


def test_no_more_threads_are_replaced_than_there_were(forever: threading.Event) -> None:
    workers, entered = Workers(2, name="c"), threading.Semaphore(0)
    for _ in range(4):
        lost = workers.submit(lambda: stuck(entered, forever))
        assert entered.acquire(timeout=WAIT_S)
        assert workers.give_up(lost)
    assert len(threads("c")) == 4
    waiting = workers.submit(lambda: 1)
    assert not workers.give_up(waiting)
    assert waiting.cancelled()
    behind = workers.submit(lambda: 2)
    forever.set()
    assert behind.result(WAIT_S) == 2
    workers.close()


def test_giving_up_what_is_done_changes_nothing() -> None:
    workers = Workers(1, name="d")
    done = workers.submit(lambda: 1)
    assert done.result(WAIT_S) == 1
    assert not workers.give_up(done)
    assert (workers.num_lost, len(threads("d"))) == (0, 1)
    workers.close()


def test_work_that_was_cancelled_or_is_done_keeps_nothing_alive(forever: threading.Event) -> None:
    class Bytes:
        def __len__(self) -> int:
            return 5

    workers, entered = Workers(1, name="e"), threading.Semaphore(0)
    first, second = Bytes(), Bytes()
    first_gone, second_gone = threading.Event(), threading.Event()
    weakref.finalize(first, first_gone.set)
    weakref.finalize(second, second_gone.set)
    assert workers.submit(first.__len__).result(WAIT_S) == 5
    del first
    assert first_gone.wait(WAIT_S)  # although its thread has had nothing else to do since
    workers.submit(lambda: stuck(entered, forever))
    assert entered.acquire(timeout=WAIT_S)
    assert workers.submit(second.__len__).cancel()
    del second
    assert second_gone.wait(WAIT_S)
    workers.close()


def test_close_drops_what_waits_and_ends_the_threads(forever: threading.Event) -> None:
    workers, entered = Workers(1, name="f"), threading.Semaphore(0)
    running = workers.submit(lambda: stuck(entered, forever))
    assert entered.acquire(timeout=WAIT_S)
    waiting = workers.submit(lambda: 1)
    [thread] = threads("f")
    workers.close()
    assert waiting.cancelled()
    forever.set()
    assert running.result(WAIT_S) == 7
    thread.join(WAIT_S)
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="after close"):
        workers.submit(lambda: 1)


def test_a_stuck_thread_does_not_keep_the_process_from_ending() -> None:
    script = (
        "import threading; from minigpt4_jax.serving.workers import Workers\n"
        "entered = threading.Event()\n"
        "def stuck():\n    entered.set(); threading.Event().wait()\n"
        "Workers(1, name='x').submit(stuck); entered.wait(60); print('over')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
        check=True,
    )
    assert ended.stdout == "over\n"
