"""minigpt4_jax.serving.watchdog: when an engine is given up."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from minigpt4_jax.serving.watchdog import LOOKS_PER_STALL, Clock, FaultWindow, Watchdog
from tests.serving import fakes
from tests.serving.fakes import LIMIT_S


def make_dog(
    clock: Clock,
    *,
    stall_s: float,
    on_stall: Callable[[float], None] = lambda seconds: None,
    alive: bool = True,
    on_gone: Callable[[], None] = lambda: None,
) -> Watchdog:
    return Watchdog(on_stall, alive=lambda: alive, on_gone=on_gone, stall_s=stall_s, clock=clock)


def test_only_faults_of_the_window_count() -> None:
    clock = fakes.Clock()
    window = FaultWindow(max_faults=2, window_s=10.0, clock=clock)
    found = []
    for pause_s in (0, 5, 5, 1, 11):
        clock.now_s += pause_s
        found.append(window.add())
    # At 0, 5, 10 (the first is just 10 s old), 11 (5 and 10 with it), 22.
    assert found == [False, False, True, True, False]


def test_who_rests_does_not_stall() -> None:
    clock = fakes.Clock()
    dog = make_dog(clock, stall_s=5.0)
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
    told: list[float] = []
    # A quarter of the time between two looks passes whenever somebody reads the clock.
    ticks = itertools.count(0.0, 0.1 / LOOKS_PER_STALL / 4)
    dog = make_dog(lambda: next(ticks), stall_s=0.1, on_stall=told.append)
    dog.moved()
    dog.start()
    dog._thread.join(LIMIT_S)
    (seconds,) = told
    assert 0.1 < seconds < 0.13


def test_time_in_which_the_whole_process_stood_still_does_not_count() -> None:
    clock = fakes.Clock()
    dog = make_dog(clock, stall_s=float(LOOKS_PER_STALL))  # it looks once a second
    dog.look()
    dog.moved()
    found = []
    for pause_s in (1, 1, 100, 1, 2, 100, 1):
        clock.now_s += pause_s
        found.append(dog.look())
    assert found == [1, 2, 2, 3, 5, 5, 6]
    assert dog.stalled_s == 206
    # Who moves begins anew, also just before such a pause.
    clock.now_s += 1
    dog.moved()
    clock.now_s += 100
    assert dog.look() == 0
    clock.now_s += 1
    assert dog.look() == 1
    dog.rest()
    assert dog.look() == 0


def test_a_thread_that_is_gone_is_told_once_though_it_rested() -> None:
    told: list[str] = []
    clock = fakes.Clock()
    dog = make_dog(clock, stall_s=0.1, alive=False, on_gone=lambda: told.append("gone"))
    dog.start()
    dog._thread.join(LIMIT_S)
    assert told == ["gone"]


def test_a_watchdog_that_was_stopped_tells_nothing() -> None:
    dog = make_dog(fakes.Clock(), stall_s=0.1)
    dog.start()
    dog.stop()
    dog._thread.join(LIMIT_S)
    assert not dog._thread.is_alive()
