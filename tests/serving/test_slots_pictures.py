"""minigpt4_jax.serving.slots: how pictures of several jobs are encoded, and whom one that cannot be concerns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax import GenerationConfig
from tests.serving.fakes import Bench, FakeModel

LONG = GenerationConfig(max_new_tokens=40)


@pytest.fixture
def bench() -> Bench:
    bench = Bench(FakeModel(num_slots=4))
    bench.scheduler.prepare()
    return bench


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


def test_the_watchdog_hears_of_every_batch_of_pictures(bench: Bench) -> None:
    stalled: list[float] = []

    def encode(images: np.ndarray) -> None:
        stalled.append(bench.scheduler.load().stalled_s)
        bench.clock.now_s += 50.0

    bench.engine.on_encode = encode
    # No step of the slots comes between two batches: nobody is in them before all nine pictures are encoded.
    _, heard = bench.submit("a", pictures=many_pictures(9))
    bench.scheduler._watchdog.moved()  # as the thread does when work comes
    bench.finish()
    assert stalled == [0.0, 0.0, 0.0]
    assert heard.done


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
