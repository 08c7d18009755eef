"""minigpt4_jax.serving.scheduler with beams: a search goes on beside the slots, and stops nobody."""

from __future__ import annotations

import pytest

from minigpt4_jax import GenerationConfig
from minigpt4_jax.serve_config import FaultsConfig
from minigpt4_jax.serving.errors import ApiError
from tests.serving.fakes import Bench, FakeModel

LONG = GenerationConfig(max_new_tokens=40)
BEAMS = GenerationConfig(max_new_tokens=40, num_beams=2)
PAUSES = 20


@pytest.fixture
def bench() -> Bench:
    """Two slots and searches of many steps; the test is the thread."""
    bench = Bench(FakeModel(), max_waiting=3, faults=FaultsConfig(max_faults=2))
    bench.scheduler.prepare()
    bench.engine.search_pauses = PAUSES
    return bench


def test_streams_go_on_while_a_search_runs(bench: Bench) -> None:
    bench.model.script = lambda question, seed: "x" * 80  # type: ignore[attr-defined]
    _, plain = bench.submit("p", generation=LONG)
    bench.turns(1)
    _, search = bench.submit("s", generation=BEAMS, n=2)
    for _ in range(PAUSES):
        before = len(plain.events)
        bench.turns(1)
        assert len(plain.events) == before + 1
        assert search.events == []
    bench.turns(1)
    assert search.done
    assert search.mistakes == []
    assert not plain.done
    bench.finish()
    assert plain.done


def test_every_step_of_a_search_is_a_movement(bench: Bench) -> None:
    stalled: list[float] = []

    def search() -> None:
        bench.clock.now_s += 7
        stalled.append(bench.scheduler.load().stalled_s)

    bench.engine.on_search = search
    bench.scheduler._watchdog.moved()
    _, heard = bench.submit("s", generation=BEAMS)
    bench.finish()
    assert heard.done
    assert stalled == [7] * (PAUSES + 1)


def test_a_deadline_ends_a_search_between_two_steps(bench: Bench) -> None:
    _, heard = bench.submit("s", generation=BEAMS, room_s=10)
    bench.turns(3)
    assert bench.engine.searches == 1
    bench.clock.now_s += 10
    bench.turns(1)
    assert heard.status == 408
    assert bench.engine.searches == 0
    assert bench.scheduler.load().running == 0


def test_a_client_that_leaves_ends_its_search_within_a_step(bench: Bench) -> None:
    steps: list[int] = []
    bench.engine.on_search = lambda: steps.append(1)
    job, heard = bench.submit("s", generation=BEAMS)
    _, behind = bench.submit("t", generation=BEAMS)
    bench.turns(3)
    bench.scheduler.cancel(job)
    bench.engine.on_search = lambda: None
    bench.turns(1)
    assert len(steps) == 3
    assert heard.events == []
    bench.finish()
    assert behind.done
    assert bench.engine.searches == 0


def test_searches_come_one_by_one_in_their_order(bench: Bench) -> None:
    heard = [bench.submit(name, generation=BEAMS)[1] for name in "ab"]
    for turns, done in [(PAUSES, [False, False]), (1, [True, False]), (PAUSES + 1, [True, True])]:
        bench.turns(turns)
        assert bench.engine.searches <= 1
        assert [one.done for one in heard] == done


def test_who_wants_a_slot_does_not_wait_for_searches_nor_they_for_slots(bench: Bench) -> None:
    searches = [bench.submit(name, generation=BEAMS)[1] for name in "ab"]
    plain = [bench.submit(name, generation=LONG)[1] for name in "cde"]
    bench.turns(1)
    assert bench.engine.searches == 1
    assert [bool(one.events) for one in plain] == [True, True, False]
    bench.turns(PAUSES)
    assert [one.done for one in searches] == [True, False]
    bench.turns(1)
    assert bench.engine.searches == 1
    bench.finish()
    assert all(one.done for one in (*searches, *plain))


def test_one_search_too_many_is_sent_away(bench: Bench) -> None:
    for name in "abcd":  # the first does not wait: nothing is searched
        bench.submit(name, generation=BEAMS)
    with pytest.raises(ApiError) as refusal:
        bench.submit("e", generation=BEAMS)
    assert refusal.value.status == 429
    _, plain = bench.submit("p", generation=LONG)  # that others wait for beams does not concern it
    bench.turns(1)
    with pytest.raises(ApiError):
        bench.submit("e", generation=BEAMS)
    bench.finish()
    assert plain.done


def test_closing_gives_a_search_up(bench: Bench) -> None:
    _, heard = bench.submit("s", generation=BEAMS)
    bench.turns(2)
    bench.scheduler.close()
    assert heard.status == 503
    assert bench.engine.searches == 0
