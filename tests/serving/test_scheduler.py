"""minigpt4_jax.serving.scheduler: who waits, who is next, and how jobs end, on a model without weights.

Faults, the thread and the end of all: `test_scheduler_faults.py`.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest

from minigpt4_jax import GenerationConfig
from minigpt4_jax.serving.jobs import Event, Started
from tests.serving.fakes import Bench, FakeModel

LONG = GenerationConfig(max_new_tokens=40)
BEAMS = GenerationConfig(max_new_tokens=40, num_beams=2)


@pytest.fixture
def bench() -> Bench:
    """Two slots; the test is the thread."""
    bench = Bench(FakeModel())
    bench.scheduler.prepare()
    return bench


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
    error = bench.refusal()
    assert (error.status, error.retry_after_s) == (429, 1)
    bench.turns(1)
    assert bench.refusal().status == 429
    bench.clock.now_s += 30
    bench.finish()
    # Those jobs took 30, 30 and 0 s: of two side by side one ends every 10 s.
    assert last.done
    bench.submit("a")
    bench.submit("b")
    bench.turns(1)
    bench.submit("c")
    assert bench.refusal().retry_after_s == 10


def test_who_has_the_fewest_slots_is_next() -> None:
    bench = Bench(FakeModel(num_slots=2), max_waiting=20)
    bench.scheduler.prepare()
    bench.submit("a", salt="a", generation=LONG)
    bench.submit("b", salt="b")
    bench.turns(1)
    names = ["a", "aa", "b", "c"]
    heard = {name: bench.submit(name, salt=name[0])[1] for name in names}
    order: list[str] = []
    while len(order) < len(names):
        bench.turns(1)
        order += [name for name in names if heard[name].events and name not in order]
    # While one of a is answered, who has none comes first; of the two in their order.
    assert order == ["b", "c", "a", "aa"]


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
    assert bench.all_free()


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
    assert bench.all_free()


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
    assert bench.all_free()


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
    assert bench.all_free()


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
    assert bench.all_free()


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
    assert bench.all_free()


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
