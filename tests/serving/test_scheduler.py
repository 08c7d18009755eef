"""minigpt4_jax.serving.scheduler: who waits, who is next, and how jobs end, on a model without weights."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from minigpt4_jax import GenerationConfig
from minigpt4_jax.serve_config import FaultsConfig
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.jobs import Event, Started
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


def refusal(bench: Bench, **settings: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        bench.submit(**settings)
    return caught.value


def all_free(bench: Bench) -> bool:
    """No slot is held, and the scheduler itself found nothing else."""
    bench.scheduler.turn()
    engine = bench.engine
    return engine.free_slots == engine.num_slots and not engine.busy and not bench.scheduler.leaks


# --- waiting ---


def test_jobs_get_slots_in_their_order_and_no_more_than_there_are(bench: Bench) -> None:
    order: list[str] = []
    for name in "abcde":
        job, heard = bench.submit(name)
        heard.on_event = lambda event, name=job.id: (
            order.append(name) if isinstance(event, Started) else None
        )
    bench.turns(1)
    assert len(bench.engine.submitted) == 2
    load = bench.scheduler.load()
    assert (load.waiting, load.running, load.busy_slots, load.num_slots) == (3, 2, 2, 2)
    assert 0 < load.cache_usage < 1
    bench.finish()
    assert order == [f"job-{number}" for number in range(5)]
    assert bench.scheduler.load().cache_usage == 0


def test_one_more_than_may_wait_is_refused_with_the_time_that_a_place_takes() -> None:
    bench = Bench(FakeModel(num_slots=2), max_waiting=1)
    bench.scheduler.prepare()
    bench.submit("a")
    bench.submit("b")  # two slots are free: neither waits
    _, last = bench.submit("c")
    error = refusal(bench)
    assert (error.status, error.retry_after_s) == (429, 1)
    bench.turns(1)
    assert refusal(bench).status == 429
    bench.clock.now_s += 30
    bench.finish()
    # Those jobs took 30, 30 and 0 s: of two side by side one ends every 10 s.
    assert last.done
    bench.submit("a")
    bench.submit("b")
    bench.turns(1)
    bench.submit("c")
    assert refusal(bench).retry_after_s == 10


def test_a_job_with_more_answers_than_slots_gets_them_all_and_the_next_one_waits(
    bench: Bench,
) -> None:
    _, many = bench.submit("m", n=3, generation=GenerationConfig(max_new_tokens=4, seed=7))
    _, other = bench.submit("o")
    bench.turns(1)
    assert not other.events
    bench.finish()
    assert [many.text(index) for index in range(3)] == ["m/7", "m/8", "m/9"]
    assert other.done
    assert all_free(bench)


def test_the_same_job_twice_is_a_mistake(bench: Bench) -> None:
    job, _ = bench.submit()
    with pytest.raises(ValueError, match="submitted already"):
        bench.scheduler.submit(job)


def test_beams_take_their_turn_and_the_slots_move_between_two_searches(bench: Bench) -> None:
    _, plain = bench.submit("p", generation=LONG)
    bench.turns(1)
    searches = [bench.submit(name, generation=BEAMS, n=2)[1] for name in "xy"]
    _, behind = bench.submit("z")
    before = len(plain.events)
    bench.turns(1)
    assert [heard.done for heard in searches] == [True, False]
    assert len(plain.events) == before + 1
    bench.finish()
    assert [heard.mistakes for heard in searches] == [[], []]
    assert behind.done
    assert plain.done


# --- cancelling and deadlines ---


def test_a_job_is_cancelled_while_it_waits_runs_or_is_over(bench: Bench) -> None:
    first, heard_first = bench.submit("a", generation=LONG, n=2)
    second, heard_second = bench.submit("b")
    bench.turns(3)
    bench.scheduler.cancel(second)
    assert bench.scheduler.load().waiting == 0
    heard = len(heard_first.events)
    bench.scheduler.cancel(first)
    bench.turns(1)
    assert bench.engine.free_slots == 2
    bench.scheduler.cancel(first)
    bench.turns(3)
    assert len(heard_first.events) == heard
    assert heard_second.events == []
    assert [record.outcome for record in bench.notes.records] == ["abort", "abort"]
    _, third = bench.submit("c")
    bench.finish()
    assert third.done
    assert all_free(bench)


@pytest.mark.parametrize("generation", [LONG, BEAMS])
def test_a_job_that_is_cancelled_while_its_pictures_are_encoded_never_begins(
    generation: GenerationConfig, bench: Bench, pictures: Any
) -> None:
    job, heard = bench.submit("a", pictures=pictures[:1], generation=generation)
    _, other = bench.submit("b", pictures=pictures[1:2])
    searches: list[int] = []
    bench.engine.on_encode = lambda images: bench.scheduler.cancel(job)
    bench.engine.on_search = lambda: searches.append(1)
    bench.finish()
    assert heard.events == []
    assert not searches
    assert len(bench.engine.submitted) == 1
    assert other.done
    assert all_free(bench)


def test_a_job_that_is_cancelled_while_it_is_searched_hears_nothing(bench: Bench) -> None:
    job, heard = bench.submit("a", generation=BEAMS)
    bench.engine.on_search = lambda: bench.scheduler.cancel(job)
    bench.finish()
    assert heard.events == []
    assert [record.outcome for record in bench.notes.records] == ["abort"]


def test_a_job_may_be_cancelled_from_its_own_emit(bench: Bench) -> None:
    job, heard = bench.submit("a", generation=LONG, n=2)
    heard.on_event = lambda event: bench.scheduler.cancel(job)
    bench.turns(2)
    assert len(heard.events) == 1
    assert all_free(bench)


def test_a_deadline_ends_a_job_that_runs_and_one_that_waits(bench: Bench) -> None:
    _, runs = bench.submit("a", generation=LONG, n=2, room_s=10)
    _, waits = bench.submit("b", room_s=5)
    _, later = bench.submit("c", room_s=20)
    bench.turns(2)
    bench.clock.now_s += 5
    bench.turns(1)
    assert waits.status == 408
    assert runs.status is None
    bench.clock.now_s += 5
    bench.turns(1)
    assert runs.status == 408
    bench.finish()
    assert later.done
    assert [r.outcome for r in bench.notes.records] == ["timeout", "timeout", "length"]
    assert all_free(bench)


def test_an_emit_that_raises_ends_its_job_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    bench.submit("a", emit=refuse, generation=LONG)
    _, other = bench.submit("b")
    bench.turns(1)
    assert bench.engine.free_slots == 1
    bench.finish()
    assert other.done
    assert "the loop is closed" in caplog.text
    assert all_free(bench)


def test_an_observer_that_raises_ends_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("no metrics")

    for name in ("first_token", "next_token", "stepped", "finished", "faulted"):
        monkeypatch.setattr(bench.notes, name, refuse)
    _, heard = bench.submit("a")
    bench.finish()
    assert heard.done


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
    assert all_free(bench)


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
    assert refusal(bench).status == 503
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
def test_an_engine_that_hangs_is_given_up_by_the_watchdog(hook: str) -> None:
    bench = Bench(FakeModel(), faults=FaultsConfig(stall_s=0.2), real_time=True)
    hangs, ends = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        assert ends.wait(LIMIT_S)

    setattr(bench.engine, hook, hang)
    bench.scheduler.start()
    wait_until(lambda: bench.scheduler.state == "ready")
    beams = hook == "on_search"
    heard = [bench.submit(name, generation=BEAMS if beams else LONG)[1] for name in "abc"]
    assert hangs.wait(LIMIT_S)
    assert all(one.over.wait(LIMIT_S) for one in heard)
    wait_until(lambda: bool(bench.fatal))
    assert "has finished nothing" in bench.fatal[0]
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
        assert refusal(threaded).status == 503
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
        heard = [threaded.submit(name, generation=LONG)[1] for name in "abc"]
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
    error = refusal(threaded)
    assert (error.status, threaded.scheduler.state) == (503, "starting")
    assert error.retry_after_s
    gate.set()
    wait_until(lambda: threaded.scheduler.state == "ready")
    assert told == [(1, 1)]
    threaded.scheduler.close()


def test_a_slot_that_is_held_for_nobody_is_noticed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    bench.submit("a")
    bench.turns(1)
    request = bench.engine.submitted[0]
    bench.finish()
    bench.engine.submit(request)
    bench.engine.step()
    bench.turns(1)
    assert bench.scheduler.leaks == 1
    assert "1 of 2 slots are free" in caplog.text
