"""generation/ahead.py: what is compiled before and beside requests, and that no request waits for it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.generation import ahead
from minigpt4_jax.generation.ahead import other_sizes
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from tests.engines import answer, counted_compiles, drawn, make_engine, make_request

CONTEXT = 100
SLOTS = 4


def text(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 384, length)]


def test_nothing_compiles_once_the_engine_is_ready(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any
) -> None:
    reference = make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=SLOTS)
    fresh = make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=SLOTS)
    done: list[tuple[int, int]] = []
    assert not fresh.ready
    fresh.compile_core(lambda *numbers: done.append(numbers))
    assert fresh.ready
    assert done[-1][0] == done[-1][1] == len(done)
    side = tiny_config.vit.image_size
    pixels = np.random.default_rng(0).normal(size=(5, side, side, 3)).astype(np.float32)

    def use(engine: Engine) -> list[list[int]]:
        shown = engine.encode_images(pixels)
        slots = [IMAGE_TOKEN_ID] * tiny_config.num_image_tokens
        requests = [
            *(make_request(prompt, logprobs=True) for prompt in prompts),
            *(make_request((text(length, length), None), steps=4) for length in (1, 64, 65, 90)),
            Request(prompt=[*slots, 5, *slots], image_embeds=shown[:2], max_new_tokens=9),
            *(make_request((text(9), None), sampling=drawn(s, top_p=0.9)) for s in range(5)),
        ]
        found = [generation.ids for generation in engine.generate(requests)]
        found += [answer(engine, ([*text(64, 64), 5, 6], None), steps=20)]
        return found

    compiled = fresh.compiled_programs
    with counted_compiles() as compiles:
        found = use(fresh)
        assert compiles == []
    assert fresh.compiled_programs == compiled
    with counted_compiles() as compiles:
        assert use(reference) == found
        assert compiles, "the listener hears nothing; the test shows nothing"


def test_the_rest_compiles_beside_requests_and_is_then_used(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=70, num_slots=1)
    fresh.compile_core()
    core = fresh.compiled_programs
    prompt = (text(50, 7), None)
    thread = threading.Thread(target=fresh.compile_rest)
    thread.start()
    answers = [answer(fresh, prompt, sampling=drawn(1))]
    while thread.is_alive():
        answers.append(answer(fresh, prompt, sampling=drawn(1)))
    assert fresh.compiled_programs > core
    with counted_compiles() as compiles:
        (last,) = fresh.generate([make_request(prompt, sampling=drawn(1))])
        assert compiles == []
    assert last.reused == 49, "extending is not among the rest"
    assert {tuple(ids) for ids in answers} == {tuple(last.ids)}


def compile_until_none_is_left(engine: Engine) -> None:
    engine.compile_wanted(lambda: engine.programs_left > 0)


def test_beside_requests_what_they_wanted_is_compiled_and_then_used(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=200, num_slots=1)
    fresh.compile_core()
    request = make_request((text(40, 7), None), steps=3, sampling=drawn(1))
    (first,) = fresh.generate([request])
    core = fresh.compiled_programs
    assert (
        fresh.programs_left == 1
    )  # the prompt's length; steps over one slot of up to 128 places are in the core
    compile_until_none_is_left(fresh)
    assert fresh.compiled_programs > core
    assert fresh._runner.programs.keys("prefill")[0] == (1, 40)
    fresh.generate(
        [make_request((text(90, 8), None), steps=3)]
    )  # takes the slot: nothing is reused
    with counted_compiles() as compiles:
        (again,) = fresh.generate([request])
        assert compiles == []
    assert again.ids == first.ids
    assert fresh._runner.prompt_key(1, 40) == (1, 40)


def test_a_size_that_cannot_be_compiled_is_tried_once(
    tiny_params: Any, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=70, num_slots=1)
    fresh.compile_core()
    tried: list[ahead.Size] = []

    def fail(runner: Any, state: Any, size: ahead.Size) -> None:
        tried.append(size)
        raise MemoryError("no room for it")

    monkeypatch.setattr("minigpt4_jax.generation.engine.compile_size", fail)
    for seed in range(2):
        assert len(answer(fresh, (text(40, seed), None), steps=3)) == 3
        if fresh.programs_left:
            with pytest.raises(MemoryError):
                compile_until_none_is_left(fresh)
    assert tried == [("insert", (1, 40))]
    assert fresh.programs_left == 0


def test_no_batch_of_prompts_has_more_tokens_than_may_be_read_at_once(
    tiny_params: Any, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_params, tiny_config, context=200, num_slots=4)
    monkeypatch.setattr(engine._runner, "read_tokens", 128)
    read = [key for name, key in other_sizes(engine._runner) if name == "prefill"]
    assert [count for count, size in read if size == 32] == [1, 2, 4]
    assert [count for count, size in read if size == 64] == [1, 2]
    assert [count for count, size in read if size == 200] == [1]
    assert all(key in read for key in [engine._runner.prompt_key(4, n) for n in (9, 60, 190)])
