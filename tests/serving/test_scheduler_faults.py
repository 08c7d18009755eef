"""minigpt4_jax.serving.scheduler: the engine's faults, its thread, draining and closing, on a model without weights."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from minigpt4_jax import GenerationConfig
from minigpt4_jax.serve_config import FaultsConfig
from minigpt4_jax.serving.watchdog import Watchdog
from tests.serving.fakes import LIMIT_S, Bench, FakeModel, running, wait_until

LONG = GenerationConfig(max_new_tokens=40)
BEAMS = GenerationConfig(max_new_tokens=40, num_beams=2)


@pytest.fixture
def bench() -> Bench:
    """Two slots; the test is the thread."""
    bench = Bench(FakeModel())
    bench.scheduler.prepare()
    return bench


@pytest.fixture
def threaded() -> Bench:
    """As `bench`, for `running`; on the time that really passes."""
    return Bench(FakeModel(), faults=FaultsConfig(max_faults=2), real_time=True)


# --- faults ---


def fail_once(bench: Bench, hook: str = "on_step", error: Exception | None = None) -> None:
    """The next call of a hook raises."""

    def fail(*args: Any) -> None:
        setattr(bench.engine, hook, lambda *args: None)
        raise error or RuntimeError("CUDA_ERROR at 0x7f")

    setattr(bench.engine, hook, fail)


def test_a_fault_fails_what_was_in_flight_and_the_rest_goes_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    flying = [bench.submit(name, generation=LONG)[1] for name in "ab"]
    _, waits = bench.submit("c")
    bench.turns(2)
    fail_once(bench)
    bench.turns(1)
    assert [heard.status for heard in flying] == [500, 500]
    assert "0x7f" not in flying[0].events[-1].error.message  # type: ignore[union-attr]
    assert "job-0" in caplog.text
    assert "0x7f" in caplog.text
    bench.finish()
    assert waits.done
    assert bench.notes.faults == 1
    assert bench.scheduler.state == "ready"
    assert [r.outcome for r in bench.notes.records] == ["error", "error", "length"]
    assert bench.all_free()


def test_repeated_faults_break_the_server_once_and_fail_everybody() -> None:
    bench = Bench(FakeModel(), faults=FaultsConfig(max_faults=2, faults_window_s=60.0))
    bench.scheduler.prepare()
    heard = []
    for _ in range(3):
        heard += [bench.submit(name, generation=LONG)[1] for name in "abc"]
        bench.turns(1)
        fail_once(bench)
        bench.turns(1)
    assert bench.scheduler.state == "broken"
    assert len(bench.fatal) == 1
    assert "more than 2 times" in bench.fatal[0]
    assert [one.status for one in heard] == [500] * 6 + [503] * 3
    assert not any(one.mistakes for one in heard)
    assert len(bench.notes.records) == 9
    assert bench.refusal().status == 503
    bench.scheduler._stalled(61.0)
    assert len(bench.fatal) == 1
    bench.scheduler.close()
    assert len(bench.notes.records) == 9


def test_faults_that_are_far_apart_break_nothing() -> None:
    bench = Bench(FakeModel(), faults=FaultsConfig(max_faults=1, faults_window_s=60.0))
    bench.scheduler.prepare()
    for _ in range(4):
        bench.submit("a")
        fail_once(bench)
        bench.turns(1)
        bench.clock.now_s += 61
    assert bench.scheduler.state == "ready"
    assert bench.notes.faults == 4


def test_an_engine_that_cannot_be_made_anew_breaks_the_server_at_once(threaded: Bench) -> None:
    threaded.engine.on_rebuild = lambda: (_ for _ in ()).throw(MemoryError("no room"))
    fail_once(threaded)
    with running(threaded) as scheduler:
        _, heard = threaded.submit("a")
        assert heard.over.wait(LIMIT_S)
        wait_until(lambda: bool(threaded.fatal))
        assert scheduler.state == "broken"
    assert heard.status == 500
    assert threaded.fatal == ["the engine's thread failed (MemoryError)"]


def test_an_engine_that_cannot_be_compiled_breaks_the_server(threaded: Bench) -> None:
    fail_once(threaded, "on_compile")
    with running(threaded) as scheduler:
        wait_until(lambda: bool(threaded.fatal))
        assert scheduler.state == "broken"


# --- the thread ---


def test_an_idle_thread_wakes_for_a_job(threaded: Bench) -> None:
    with running(threaded):
        for _ in range(3):
            _, heard = threaded.submit("a")
            assert heard.over.wait(LIMIT_S)
            assert heard.done
            wait_until(lambda: threaded.scheduler.load().stalled_s == 0)


def test_nothing_is_done_while_there_is_no_work(
    threaded: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    turn = threaded.scheduler.turn
    monkeypatch.setattr(threaded.scheduler, "turn", lambda: (turns.append(1), turn()))
    with running(threaded):
        _, heard = threaded.submit("a", max_new_tokens=5)
        assert heard.over.wait(LIMIT_S)
        wait_until(lambda: threaded.scheduler.load().stalled_s == 0)
    assert len(turns) == 5


@pytest.mark.parametrize("hook", ["on_step", "on_search"])
def test_an_engine_that_hangs_is_given_up_by_the_watchdog(
    hook: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # The watchdog looks every 10 ms of real time, and after each look so much passes on a clock that otherwise stands:
    # what passes between two looks that are far apart does not count.
    bench = Bench(FakeModel(), faults=FaultsConfig(stall_s=0.2))
    hangs, ends = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        assert ends.wait(LIMIT_S)

    setattr(bench.engine, hook, hang)
    bench.scheduler.start()
    wait_until(lambda: bench.scheduler.state == "ready")
    beams = hook == "on_search"
    heard = bench.submit_together(*"abc", generation=BEAMS if beams else LONG)
    assert hangs.wait(LIMIT_S)
    watchdog = bench.scheduler._watchdog
    while not bench.fatal:
        bench.clock.now_s += 0.01
        wait_until(lambda: bool(bench.fatal) or watchdog._looked_s == bench.clock.now_s)
    assert all(one.over.wait(LIMIT_S) for one in heard)
    assert "has finished nothing" in bench.fatal[0]
    assert " in hang\n" in capfd.readouterr().err  # where every thread stands
    assert [one.status for one in heard] == [500, 503 if beams else 500, 503]
    assert len(bench.notes.records) == 3
    # It comes back: nothing is said twice.
    ends.set()
    bench.scheduler.close()
    assert [len(one.events) for one in heard] == [1, 1, 1]
    assert len(bench.fatal) == 1
    assert len(bench.notes.records) == 3


def test_an_idle_server_does_not_stall() -> None:
    bench = Bench(FakeModel(), faults=FaultsConfig(stall_s=0.01), real_time=True)
    looks: list[float] = []

    class Watched(Watchdog):
        @property
        def stalled_s(self) -> float:
            looks.append(Watchdog.stalled_s.__get__(self))
            return looks[-1]

    bench.scheduler._watchdog.__class__ = Watched
    with running(bench) as scheduler:
        wait_until(lambda: len(looks) > 50)
        assert scheduler.state == "ready"


# --- the end ---


def test_draining_answers_what_is_there_and_refuses_the_rest(threaded: Bench) -> None:
    with running(threaded) as scheduler:
        gate = threading.Event()
        threaded.engine.on_step = lambda: gate.wait(LIMIT_S) and None
        heard = [threaded.submit(name)[1] for name in "abc"]
        found: list[bool] = []
        drain = threading.Thread(target=lambda: found.append(scheduler.drain(LIMIT_S)))
        drain.start()
        wait_until(lambda: scheduler.state == "draining")
        assert threaded.refusal().status == 503
        gate.set()
        drain.join(LIMIT_S)
    assert found == [True]
    assert all(one.done for one in heard)


def test_what_is_left_when_the_time_to_drain_is_over_fails(bench: Bench) -> None:
    heard = [bench.submit(name, generation=LONG)[1] for name in "abc"]
    bench.turns(2)
    assert not bench.scheduler.drain(0.0)
    assert [one.status for one in heard] == [503, 503, 503]
    bench.turns(1)
    assert bench.engine.free_slots == 2
    assert bench.scheduler.drain(0.0)


def test_closing_fails_what_is_left_and_frees_the_slots(threaded: Bench) -> None:
    with running(threaded) as scheduler:
        gate = threading.Event()
        threaded.engine.on_step = lambda: gate.wait(LIMIT_S) and None
        heard = threaded.submit_together(*"abc", generation=LONG)
        wait_until(lambda: scheduler.load().running == 2)
        threading.Thread(target=scheduler.close).start()
        assert all(one.over.wait(LIMIT_S) for one in heard)
        gate.set()
    assert scheduler.state == "stopped"
    assert [one.status for one in heard] == [503, 503, 503]
    assert threaded.engine.free_slots == 2
    assert not threaded.fatal
    scheduler.close()


def test_nothing_is_taken_before_the_core_is_compiled(threaded: Bench) -> None:
    gate = threading.Event()
    threaded.engine.on_compile = lambda: gate.wait(LIMIT_S) and None
    told: list[tuple[int, int]] = []
    threaded.scheduler.start(lambda done, total: told.append((done, total)))
    error = threaded.refusal()
    assert (error.status, threaded.scheduler.state) == (503, "starting")
    assert error.retry_after_s
    gate.set()
    wait_until(lambda: threaded.scheduler.state == "ready")
    assert told == [(1, 1)]
    threaded.scheduler.close()
