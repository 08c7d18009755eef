"""generation/loop.py: what is shared, reused, moved, given up and repaired around the device's functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Generation, Request
from minigpt4_jax.generation.residents import Resident
from minigpt4_jax.generation.sampling import TOP_LOGPROBS
from tests.engines import (
    answer,
    answer_all,
    drawn,
    make_engine,
    make_request,
)

CONTEXT = 100
SLOTS = 4


@pytest.fixture(scope="module")
def engine(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    return make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=SLOTS)


def run(engine: Engine, generations: list[Generation]) -> list[list[int]]:
    while not all(generation.finished for generation in generations):
        engine.step()
    return [generation.ids for generation in generations]


def text(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 384, length)]


# --- slots ---


def test_active_slots_share_one_decode_step(engine: Engine) -> None:
    requests = [make_request((text(9, seed), None), steps=7) for seed in range(SLOTS)]
    before = engine.counters.decode_steps
    engine.generate(requests)
    # The prompts were read together; each of the six further tokens is one step for all of them.
    assert engine.counters.decode_steps - before == 6


def test_more_requests_than_slots_take_turns(engine: Engine) -> None:
    prompts = [(text(5 + seed, seed), None) for seed in range(11)]
    requests = [
        make_request(prompt, steps=1 + seed % 5, sampling=drawn(seed))
        for seed, prompt in enumerate(prompts)
    ]
    found = [generation.ids for generation in engine.generate(requests)]
    assert found == [list(engine.stream(request)) for request in requests]
    assert engine.free_slots == SLOTS
    assert not engine.busy


def test_long_prompts_that_come_together_are_not_all_read_before_the_next_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._runner, "read_tokens", 128)

    def read_in_first_step(length: int) -> int:
        waiting = [
            engine.submit(make_request((text(length, length + s), None), steps=3)) for s in (0, 1)
        ]
        before = engine.counters.prefills
        engine.step()
        prompts = sum(generation.slot >= 0 for (generation,) in waiting)
        assert engine.counters.prefills - before == 1
        run(engine, [generation for (generation,) in waiting])
        return prompts

    assert read_in_first_step(90) == 1  # padded to 96 or 100
    assert read_in_first_step(40) == 2


def test_a_batch_of_prompts_takes_what_the_one_before_it_left(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._runner, "read_tokens", 128)
    lengths = (60, 48, 47)  # padded to 64, 48 and 48
    waiting = [engine.submit(make_request((text(n, 500 + n), None), steps=3)) for n in lengths]
    engine.step()
    assert [generation.slot >= 0 for (generation,) in waiting] == [True, True, False]
    run(engine, [generation for (generation,) in waiting])


def test_a_request_joins_while_others_run(engine: Engine) -> None:
    first = make_request((text(20, 1), None), steps=30, sampling=drawn(1))
    second = make_request((text(33, 2), None), steps=5, sampling=drawn(2))
    alone = [list(engine.stream(first)), list(engine.stream(second))]
    (running,) = engine.submit(first)
    for _ in range(7):
        engine.step()
    assert 0 < len(running.ids) < 30
    (joined,) = engine.submit(second)
    assert run(engine, [running, joined]) == alone


def test_a_step_runs_over_fewer_rows_once_the_first_slots_are_free(engine: Engine) -> None:
    lengths = [3, 4, 40]
    requests = [
        make_request((text(8, seed), None), steps=steps, sampling=drawn(seed))
        for seed, steps in enumerate(lengths)
    ]
    alone = [list(engine.stream(request)) for request in requests]
    before = engine.counters.moves
    found = [engine.submit(request)[0] for request in requests]
    slots = set()
    while not found[2].finished:
        slots.add(found[2].slot)
        engine.step()
    assert engine.counters.moves > before
    assert slots >= {0, 2}, "the last request never moved down"
    assert run(engine, found) == alone


def test_cancelling_frees_the_slot_for_the_very_next_step(engine: Engine) -> None:
    running = [
        engine.submit(make_request((text(6, seed), None), steps=50))[0] for seed in range(SLOTS)
    ]
    engine.step()
    assert engine.free_slots == 0
    (waiting,) = engine.submit(make_request((text(12, 9), None), steps=3, sampling=drawn(3)))
    engine.cancel(running[1])
    assert running[1].finish_reason == "cancelled"
    engine.step()
    assert waiting.slot >= 0
    kept = len(running[1].ids)
    assert run(engine, [waiting]) == [list(engine.stream(waiting.request))]
    assert len(running[1].ids) == kept, "a cancelled request was still given tokens"
    for generation in running:
        engine.cancel(generation)
    assert engine.free_slots == SLOTS


def test_a_request_that_waits_can_be_cancelled(engine: Engine) -> None:
    running = [engine.submit(make_request((text(6), None)))[0] for _ in range(SLOTS)]
    (waiting,) = engine.submit(make_request((text(7), None)))
    engine.step()
    engine.cancel(waiting)
    assert waiting.finish_reason == "cancelled"
    run(engine, running)
    assert waiting.ids == []
    assert not engine.busy


# --- answers to one prompt ---


def test_several_answers_to_one_prompt_read_it_once(engine: Engine) -> None:
    request = make_request((text(30, 5), None), sampling=drawn(11))
    before = engine.counters.prefills
    found = run(engine, engine.submit(request, count=6))  # more than there are slots
    assert engine.counters.prefills == before + 1
    alone = [
        answer(engine, (request.prompt, None), sampling=drawn(11 + number)) for number in range(6)
    ]
    assert found == alone
    assert len({tuple(ids) for ids in found}) == 6


def test_the_prompt_that_answers_shared_is_not_kept(engine: Engine) -> None:
    found = engine.submit(make_request((text(30), None)), count=3)
    run(engine, found)
    assert found[0].shared.prefix is None


# --- stops, least lengths, log-probabilities ---


def test_every_request_stops_by_its_own_tokens(engine: Engine) -> None:
    prompt = (text(15, 6), None)
    whole = answer(engine, prompt, sampling=drawn(8), steps=20)
    stops = [{whole[3]}, {whole[9]}, set(), {whole[6], whole[15]}]
    requests = [
        make_request(prompt, steps=20, sampling=drawn(8), stop_tokens=stop) for stop in stops
    ]
    for generation, stop in zip(engine.generate(requests), stops, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stop), 19)
        assert generation.ids == whole[: end + 1]
        assert generation.finish_reason == ("stop" if stop else "length")


def test_no_stop_is_chosen_before_the_least_length(engine: Engine) -> None:
    prompt = (text(15, 6), None)
    whole = answer(engine, prompt, sampling=drawn(8), steps=20)
    stop = {whole[2]}
    short = answer(engine, prompt, sampling=drawn(8), steps=20, stop_tokens=stop)
    long = answer(engine, prompt, sampling=drawn(8), steps=20, stop_tokens=stop, min_new_tokens=10)
    assert len(short) == 1 + whole.index(whole[2])
    assert not stop & set(long[:10])
    assert len(long) > 10
    greedy = answer(engine, prompt, steps=1)
    assert answer(engine, prompt, stop_tokens=greedy, min_new_tokens=1, steps=1) != greedy


def test_logprobs_are_those_of_the_full_model(
    engine: Engine, prompts: Any, full_logits: Any
) -> None:
    requests = [
        make_request(prompt, sampling=drawn(4), logprobs=number % 2 == 0)
        for number, prompt in enumerate(prompts)
    ]
    for number, generation in enumerate(engine.generate(requests)):
        if number % 2:
            assert generation.logprobs == []
            continue
        ids, embeds = prompts[number]
        whole = full_logits([*ids, *generation.ids], embeds)[len(ids) - 1 : -1]
        expected = np.asarray(jax.nn.log_softmax(whole))
        assert len(generation.logprobs) == len(generation.ids)
        for row, token, found in zip(expected, generation.ids, generation.logprobs, strict=True):
            assert found.chosen == pytest.approx(row[token], abs=5e-5)
            assert len(found.top) == TOP_LOGPROBS
            assert [value for _, value in found.top] == sorted(
                (value for _, value in found.top), reverse=True
            )
            for other, value in found.top:
                assert value == pytest.approx(row[other], abs=5e-5)


# --- what a slot still holds ---


def turns(engine: Engine, config: ModelConfig, pictures: list[Any]) -> tuple[Request, Request]:
    """A question about a picture, and the next one after some answer to it."""
    slots = [IMAGE_TOKEN_ID] * config.num_image_tokens
    first = [*text(20, 1), *slots, *text(25, 2)]
    settings: dict[str, Any] = {"max_new_tokens": 6, "sampling": drawn(3)}
    one = Request(prompt=first, image_embeds=pictures[:1], **settings)
    answered = list(engine.stream(one))
    second = [*first, *answered, *text(4, 3), *slots * (len(pictures) - 1), *text(3, 4)]
    return one, Request(prompt=second, image_embeds=pictures, **settings)


@pytest.fixture
def pictures(engine: Engine) -> list[Any]:
    size = engine.config.vit.image_size
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    return engine.encode_images(pixels)


@pytest.mark.parametrize("count", [1, 2])
def test_the_next_turn_reads_only_what_is_new(
    count: int, engine: Engine, tiny_config: ModelConfig, pictures: list[Any], full_logits: Any
) -> None:
    one, two = turns(engine, tiny_config, pictures[:count])
    before = engine.counters.prefills, engine.counters.images
    (found,) = engine.generate([two])
    # All but what follows the last token of the first answer, which the model never read.
    assert found.reused == len(one.prompt) + 5
    assert (engine.counters.prefills, engine.counters.images) == before
    embeds = np.concatenate([np.asarray(picture) for picture in pictures[:count]])
    fresh = answer(engine, ([7, *two.prompt], embeds), sampling=drawn(3), steps=6)
    assert found.ids != fresh, "the prompt is not looked at; the test shows nothing"
    # Read anew, in another slot's place, the same prompt gives the same answer.
    engine._residents = [Resident() for _ in range(SLOTS)]
    again = engine.generate([two])[0]
    assert again.reused == 0
    assert again.ids == found.ids


def test_another_picture_in_the_same_place_is_read_anew(
    engine: Engine, tiny_config: ModelConfig, pictures: list[Any]
) -> None:
    one, two = turns(engine, tiny_config, pictures[:1])
    other = Request(
        prompt=two.prompt,
        image_embeds=[jnp.array(pictures[1])],
        max_new_tokens=6,
        sampling=drawn(3),
    )
    expected = answer(engine, (two.prompt, np.asarray(pictures[1])), sampling=drawn(3), steps=6)
    list(engine.stream(one))
    (found,) = engine.generate([other])
    assert found.reused < one.prompt.index(IMAGE_TOKEN_ID) + 1
    assert found.ids == expected


def test_a_slot_that_was_moved_away_from_is_not_taken_for_what_it_held_before(
    engine: Engine,
) -> None:
    long = make_request((text(50, 31), None), steps=4, sampling=drawn(2))
    alone = list(engine.stream(long))
    # It ends in slot 1; then others take slots 0 and 1, and the second of them moves down.
    engine._residents = [Resident() for _ in range(SLOTS)]
    first = engine.submit(make_request((text(6, 1), None), steps=9))
    run(engine, [*first, *engine.submit(long)])
    brief = engine.submit(make_request((text(6, 2), None), steps=2))
    other = engine.submit(make_request((text(40, 3), None), steps=30, sampling=drawn(7)))
    before = engine.counters.moves
    while engine.counters.moves == before:
        engine.step()
    again = engine.submit(long)
    assert run(engine, again) == [alone]
    assert again[0].reused == 0
    run(engine, [*brief, *other])


def test_the_last_token_of_a_prompt_is_always_read(engine: Engine) -> None:
    prompt = (text(50, 7), None)
    first = answer(engine, prompt, sampling=drawn(1))
    (again,) = engine.generate([make_request(prompt, sampling=drawn(1))])
    assert again.reused == 49
    assert again.ids == first


def test_what_somebody_with_another_salt_left_is_not_taken_up(engine: Engine) -> None:
    prompt = (text(50, 8), None)
    found = [
        engine.generate([make_request(prompt, sampling=drawn(1), salt=salt)])[0]
        for salt in ("mine", "mine", "another's", "another's", None)
    ]
    assert [one.reused for one in found] == [0, 49, 0, 49, 0]
    assert len({tuple(one.ids) for one in found}) == 1


# --- faults ---


def test_a_probe_uses_the_device_once_and_changes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request((text(20, 5), None), sampling=drawn(2))
    alone = list(engine.stream(request))
    calls: list[int] = []
    decode = engine._runner.decode

    def count(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return decode(*args, **settings)

    monkeypatch.setattr(engine._runner, "decode", count)
    before = dataclasses.replace(engine.counters)
    assert engine.step() == []
    assert calls == []
    engine.probe()
    assert engine.step() == engine.step() == []
    assert calls == [1]
    assert engine.counters == before
    # Somebody who is answered is probe enough.
    (generation,) = engine.submit(request)
    engine.step()
    engine.probe()
    calls.clear()
    engine.step()
    assert calls == [1]
    assert run(engine, [generation]) == [alone]


def test_a_device_that_fails_a_probe_is_a_fault(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is gone")

    before = engine.counters.faults
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "decode", fail)
        engine.probe()
        assert engine.step() == []
    assert engine.counters.faults == before + 1
    assert len(answer(engine, (text(6), None))) == 10


def test_a_fault_of_the_device_ends_what_runs_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        make_request((text(6, seed), None), steps=9, sampling=drawn(seed)) for seed in range(6)
    ]
    alone = [list(engine.stream(request)) for request in requests]
    found = [engine.submit(request)[0] for request in requests]
    engine.step()
    engine.step()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "decode", fail)
        ended = engine.step()
    assert ended
    assert {generation.finish_reason for generation in ended} == {"error"}
    assert all(str(generation.error) == "the device is gone" for generation in ended)
    left = [generation for generation in found if generation not in ended]
    assert left, "nothing was waiting; the test shows little"
    run(engine, left)
    for generation, ids in zip(found, alone, strict=True):
        assert generation.ids == ids or generation in ended
    assert engine.free_slots == SLOTS


def test_a_prompt_that_cannot_be_read_does_not_come_back_for_ever(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(engine._runner, "read", fail)
    with pytest.raises(RuntimeError, match="no"):
        answer(engine, (text(6), None))
    assert not engine.busy


def test_logits_that_are_not_finite_end_their_row_alone(
    engine: Engine, tiny_config: ModelConfig
) -> None:
    slots = [IMAGE_TOKEN_ID] * tiny_config.num_image_tokens
    poison = np.full((len(slots), tiny_config.llama.width), np.nan, np.float32)
    good = make_request((text(40, 3), None), steps=12, sampling=drawn(3))
    alone = list(engine.stream(good))
    bad = make_request(([*text(30), *slots, 5], poison))
    found = [engine.submit(request)[0] for request in (bad, good)]
    run(engine, found)
    assert found[0].finish_reason == "error"
    assert "not finite" in str(found[0].error)
    assert found[0].ids == []
    assert found[1].ids == alone
    # And whoever comes into the slot after it.
    for _ in range(SLOTS):
        assert answer_all(engine, [(good.prompt, None)] * SLOTS, steps=12, sampling=drawn(3)) == (
            [alone] * SLOTS
        )
