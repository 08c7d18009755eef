"""minigpt4_jax.serving.watchdog: when an engine is given up."""

from __future__ import annotations

import threading

from minigpt4_jax.serving.watchdog import FaultWindow, Watchdog
from tests.serving.fakes import LIMIT_S, Clock


def test_only_faults_of_the_window_count() -> None:
    clock = Clock()
    window = FaultWindow(max_faults=2, window_s=10.0, clock=clock)
    found = []
    for pause_s in (0, 5, 5, 1, 11):
        clock.now_s += pause_s
        found.append(window.add())
    # At 0, 5, 10 (the first is just 10 s old), 11 (5 and 10 with it), 22.
    assert found == [False, False, True, True, False]


def test_who_rests_does_not_stall() -> None:
    clock = Clock()
    dog = Watchdog(lambda seconds: None, stall_s=5.0, clock=clock)
    assert dog.stalled_s == 0
    dog.moved()
    clock.now_s += 3
    assert dog.stalled_s == 3
    dog.moved()
    assert dog.stalled_s == 0
    clock.now_s += 3
    dog.rest()
    assert dog.stalled_s == 0


def test_a_stall_is_told_once() -> None:
    clock, told, first = Clock(), [], threading.Event()

    def stalled(seconds: float) -> None:
        told.append(seconds)
        first.set()

    dog = Watchdog(stalled, stall_s=0.1, clock=clock)
    dog.moved()
    dog.start()
    clock.now_s += 7
    assert first.wait(LIMIT_S)
    dog._thread.join(LIMIT_S)
    assert told == [7]


def test_a_watchdog_that_was_stopped_tells_nothing() -> None:
    clock = Clock()
    dog = Watchdog(lambda seconds: None, stall_s=0.1, clock=clock)
    dog.start()
    dog.stop()
    dog._thread.join(LIMIT_S)
    assert not dog._thread.is_alive()
