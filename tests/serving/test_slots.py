"""minigpt4_jax.serving.slots: what a fault of one job does to the others, and what the observer is told."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt4_jax import GenerationConfig
from minigpt4_jax.serve_config import FaultsConfig
from minigpt4_jax.serving.jobs import Started
from tests.serving.fakes import Bench, FakeModel

LONG = GenerationConfig(max_new_tokens=40)
BEAMS = GenerationConfig(max_new_tokens=40, num_beams=2)


@pytest.fixture
def bench() -> Bench:
    bench = Bench(FakeModel(num_slots=4), faults=FaultsConfig(max_faults=2))
    bench.scheduler.prepare()
    return bench


def spoil(bench: Bench, *questions: str) -> None:
    """Jobs that ask one of these get logits that are no numbers."""
    wanted = [tuple(bench.job(question)[0].prompt) for question in questions]
    bench.engine.spoilt = lambda request: tuple(request.prompt) in wanted


# --- work beside the slots that fails ---


def fail(*args: Any) -> None:
    raise RuntimeError("out of memory")


def test_one_request_that_needs_too_much_memory_again_and_again_ends_no_server(
    bench: Bench, pictures: Any
) -> None:
    bench.engine.on_encode = bench.engine.on_search = fail
    _, plain = bench.submit("p", generation=LONG)
    heard = []
    for _ in range(6):
        heard.append(bench.submit("a", pictures=pictures[:1])[1])
        heard.append(bench.submit("b", generation=BEAMS)[1])
        bench.turns(1)
    assert [one.status for one in heard] == [500] * 12
    bench.finish()
    assert plain.done
    assert bench.notes.faults == 0
    assert bench.scheduler.state == "ready"


@pytest.mark.parametrize("hook", ["on_encode", "on_search"])
def test_a_device_that_is_lost_is_noticed_though_nobody_gets_as_far_as_a_slot(
    hook: str, bench: Bench, pictures: Any
) -> None:
    setattr(bench.engine, hook, fail)
    bench.engine.on_step = fail
    generation = BEAMS if hook == "on_search" else LONG
    for number in range(3):
        assert bench.scheduler.state == "ready"
        assert bench.notes.faults == number
        bench.submit("a", pictures=pictures[:1], generation=generation)
        bench.turns(1)
    assert bench.scheduler.state == "broken"
    assert len(bench.fatal) == 1


def test_after_a_failure_beside_the_slots_one_step_is_made_and_no_more(
    bench: Bench, pictures: Any
) -> None:
    steps: list[int] = []
    bench.engine.on_encode, bench.engine.on_step = fail, lambda: steps.append(1)
    bench.submit("a", pictures=pictures[:1])
    bench.turns(3)
    assert steps == [1]


# --- requests and searches that fail ---


def test_a_request_that_the_engine_refuses_fails_alone_and_is_no_fault(bench: Bench) -> None:
    _, heard = bench.submit("a", max_new_tokens=10_000)
    _, other = bench.submit("b")
    bench.finish()
    assert heard.status == 500
    assert other.done
    assert bench.notes.faults == 0


def test_a_search_that_fails_is_its_jobs_alone(bench: Bench) -> None:
    bench.engine.on_search = fail
    _, plain = bench.submit("p", generation=LONG)
    bench.turns(1)
    _, heard = bench.submit("a", generation=BEAMS)
    bench.finish()
    assert heard.status == 500
    assert plain.done
    assert bench.notes.faults == 0


def test_beams_that_find_too_few_answers_fail(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = bench.engine.beam_steps

    def too_few(*args: Any, **settings: Any) -> Any:
        return [found[:1] for found in (yield from search(*args, **settings))]

    monkeypatch.setattr(bench.engine, "beam_steps", too_few)
    _, heard = bench.submit("a", generation=BEAMS, n=2)
    bench.finish()
    assert heard.status == 500


def test_a_job_says_whose_prompts_it_may_share(bench: Bench) -> None:
    for salt in ("one key", None):
        bench.submit("a", salt=salt)
        bench.finish()
    assert [request.salt for request in bench.engine.submitted] == ["one key", None]


# --- logits that are no numbers ---


def test_logits_that_are_no_numbers_end_their_job_and_count_as_no_fault(bench: Bench) -> None:
    spoil(bench, "bad")
    _, good = bench.submit("good", generation=LONG)
    bench.turns(2)
    _, bad = bench.submit("bad", n=2)
    bench.turns(2)
    assert bad.status == 500
    assert bench.engine.free_slots == 3
    bench.finish()
    assert good.done
    assert bench.notes.faults == 0


def test_logits_that_are_no_numbers_again_and_again_break_the_server(bench: Bench) -> None:
    spoil(bench, "bad")
    for number in range(4):
        assert bench.scheduler.state == "ready"
        assert bench.notes.faults == max(0, number - 1)
        bench.submit("bad")
        bench.turns(1)
    assert bench.scheduler.state == "broken"


def test_an_answer_in_between_shows_that_the_engine_is_well(bench: Bench) -> None:
    spoil(bench, "bad")
    for _ in range(5):
        bench.submit("bad")
        bench.turns(1)
        bench.submit("good")
        bench.finish()
    assert bench.notes.faults == 0
    assert bench.scheduler.state == "ready"


def test_an_answer_that_cannot_be_read_fails_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, heard = bench.job("a", generation=LONG)
    stream = job.conversation.answer_stream()
    monkeypatch.setattr(stream, "feed", lambda token: 1 / 0)
    monkeypatch.setattr(job.conversation, "answer_stream", lambda **settings: stream)
    bench.scheduler.submit(job)
    _, other = bench.submit("b")
    bench.finish()
    assert heard.status == 500
    assert other.done
    assert bench.engine.free_slots == 4


def test_an_answer_that_somebody_else_took_back_fails(bench: Bench) -> None:
    _, heard = bench.submit("a", generation=LONG)
    bench.turns(1)
    (generation,) = [one for one in bench.engine._slots if one is not None]
    bench.engine.cancel(generation)
    bench.turns(1)
    assert heard.status == 500


# --- what is told ---


def test_an_answer_whose_stop_string_came_is_complete_though_the_engine_failed_then(
    bench: Bench,
) -> None:
    bench.model.script = lambda question, seed: "abcdef" * 9  # type: ignore[attr-defined]
    _, heard = bench.submit("a", generation=LONG, stop_strings=("cd",))
    bench.turns(3)
    generations = [one for one in bench.engine._slots if one is not None]
    step = bench.engine.step

    def step_and_fail() -> Any:
        changed = step()
        for generation in generations:
            bench.engine._finish(generation, "error")
        return changed

    bench.engine.step = step_and_fail
    bench.turns(1)
    assert heard.done
    assert heard.text() == "ab"
    assert heard.ends[0].finish_reason == "stop"


def test_a_stop_string_frees_its_slot_in_the_same_step(bench: Bench) -> None:
    generation = GenerationConfig(max_new_tokens=40, seed=7)
    _, heard = bench.submit("a", generation=generation, stop_strings=("/7",), n=2)
    bench.turns(2)
    assert bench.engine.free_slots == 2
    bench.turns(1)
    assert bench.engine.free_slots == 3
    assert heard.ends[0].finish_reason == "stop"
    bench.finish()
    assert heard.text(1).startswith("a/8 a/8")


@pytest.mark.parametrize("hook", ["on_step", "on_encode", "on_search"])
def test_every_piece_of_work_that_was_finished_is_a_movement(
    hook: str, bench: Bench, pictures: Any
) -> None:
    def work(*args: Any) -> None:
        bench.clock.now_s += 7
        assert bench.scheduler.load().stalled_s == 7

    def after(*args: Any) -> None:
        assert bench.scheduler.load().stalled_s == 0

    bench.engine.on_step = after
    setattr(bench.engine, hook, work)
    bench.scheduler._watchdog.moved()
    bench.submit("a", pictures=pictures[:1], generation=BEAMS if hook == "on_search" else LONG)
    bench.turns(1)
    assert bench.scheduler.load().stalled_s == 0


def test_the_observer_is_told_the_times_of_a_job(bench: Bench) -> None:
    bench.model.script = lambda question, seed: "abc"  # type: ignore[attr-defined]
    job, heard = bench.job("a", n=2, generation=LONG)
    bench.clock.now_s += 1  # it waits
    bench.scheduler.submit(job)
    waits = bench.clock.now_s

    def step() -> None:
        bench.clock.now_s += 2 if bench.clock.now_s == waits else 0.5

    bench.engine.on_step = step
    bench.finish()
    assert bench.notes.first == [3, 3]
    assert bench.notes.gaps == [0.5] * 6
    assert bench.notes.steps == [2] * 4
    (record,) = bench.notes.records
    assert record.outcome == "stop"
    assert (record.queue_s, record.prefill_s, record.decode_s) == (1, 2, 1.5)
    assert record.total_s == 4.5
    assert (record.n, record.generated_tokens, record.max_new_tokens) == (2, 8, 40)
    assert record.prompt_tokens == len(job.prompt)
    assert heard.ends[0].num_tokens == 4


def test_beams_have_no_times_of_single_tokens(bench: Bench) -> None:
    def search() -> None:
        bench.clock.now_s += 7

    bench.engine.on_search = search
    bench.submit("a", generation=BEAMS, n=2)
    bench.finish()
    assert bench.notes.first == [7, 7]
    assert bench.notes.gaps == []
    (record,) = bench.notes.records
    assert (record.prefill_s, record.decode_s, record.total_s) == (None, None, 7)


def test_tokens_that_were_still_in_a_slot_are_told_first(bench: Bench) -> None:
    begun = bench.engine._begun

    def reuse(generation: Any) -> None:
        generation.reused = 9
        begun(generation)

    bench.engine._begun = reuse
    _, heard = bench.submit("a")
    bench.finish()
    assert heard.events[0] == Started(cached_tokens=9)
    assert bench.notes.records[0].cached_tokens == 9
