"""minigpt4_jax.serving.slots: what a fault of one job does to the others, and what the observer is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

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


# --- pictures ---


def test_pictures_of_jobs_that_come_together_are_encoded_together(
    bench: Bench, pictures: Any
) -> None:
    bench.submit("a", pictures=pictures[:2])
    bench.submit("b")
    bench.submit("c", pictures=pictures[2:])
    bench.turns(1)
    assert bench.engine.encoded == [3]
    assert [len(request.image_embeds) for request in bench.engine.submitted] == [0, 2, 1]


def many_pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (20 * number, 0, 0)) for number in range(count)]


def test_many_pictures_do_not_hold_up_answers_under_way(bench: Bench) -> None:
    shown = many_pictures(10)
    _, plain = bench.submit("p", generation=LONG)
    bench.turns(1)
    _, first = bench.submit("a", pictures=shown[:5], generation=LONG)
    _, second = bench.submit("b", pictures=shown[5:], generation=LONG)
    told = [len(plain.pieces)]
    for _ in range(3):
        bench.turns(1)
        told.append(len(plain.pieces))
    # Four at once: the first has its fifth picture in the second batch.
    assert bench.engine.encoded == [4, 4, 2]
    assert told == [1, 2, 3, 4]
    assert (len(first.pieces), len(second.pieces)) == (2, 1)
    assert [len(request.image_embeds) for request in bench.engine.submitted] == [0, 5, 5]
    bench.finish()
    assert first.done
    assert second.done


def test_the_watchdog_hears_of_every_batch_of_pictures(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalled: list[float] = []

    def encode(images: np.ndarray) -> None:
        stalled.append(bench.scheduler.load().stalled_s)
        bench.clock.now_s += 50.0

    bench.engine.on_encode = encode
    shown = many_pictures(12)
    heard = [bench.submit("a", pictures=shown[first : first + 4])[1] for first in (0, 4, 8)]
    bench.finish()
    assert stalled == [0.0, 0.0, 0.0]
    assert all(one.done for one in heard)


def test_a_job_that_leaves_between_two_batches_of_its_pictures_is_gone(bench: Bench) -> None:
    shown = many_pictures(10)
    job, heard = bench.submit("a", pictures=shown[:8])
    _, other = bench.submit("b", pictures=shown[8:])
    bench.turns(1)
    bench.scheduler.cancel(job)
    bench.finish()
    assert heard.events == []
    assert other.done
    assert bench.engine.encoded == [4, 2]
    assert bench.scheduler.leaks == 0


def test_only_the_job_whose_picture_cannot_be_encoded_fails(
    bench: Bench, pictures: Any, caplog: pytest.LogCaptureFixture
) -> None:
    poison = bench.model.encoder.prepare(pictures[1]).pixels

    def encode(images: np.ndarray) -> None:
        if any(np.array_equal(image, poison) for image in images):
            raise RuntimeError("no picture of mine")

    bench.engine.on_encode = encode
    heard = [bench.submit("a", pictures=pictures[i : i + 1])[1] for i in range(3)]
    heard.append(bench.submit("d")[1])
    bench.finish()
    assert [one.status for one in heard] == [None, 500, None, None]
    assert [one.done for one in heard] == [True, False, True, True]
    assert bench.notes.faults == 0
    assert "The request job-1 failed" in caplog.text
    assert "job-0 failed" not in caplog.text


def test_a_batch_that_is_too_large_fails_nobody(bench: Bench, pictures: Any) -> None:
    def encode(images: np.ndarray) -> None:
        if len(images) > 1:
            raise MemoryError("too many")

    bench.engine.on_encode = encode
    heard = [bench.submit("a", pictures=pictures[i : i + 1])[1] for i in range(3)]
    bench.finish()
    assert all(one.done for one in heard)
    assert bench.engine.encoded == [3, 1, 1, 1]


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


def test_pictures_of_jobs_that_are_over_are_not_encoded_one_by_one(
    bench: Bench, pictures: Any
) -> None:
    jobs = [bench.submit("a", pictures=pictures[i : i + 1])[0] for i in range(3)]

    def encode(images: np.ndarray) -> None:
        for job in jobs[1:]:
            bench.scheduler.cancel(job)
        raise RuntimeError("too many")

    bench.engine.on_encode = encode
    bench.turns(1)
    assert bench.engine.encoded == [3, 1]


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
