"""The programs behind an engine: in which sizes they come, when they are compiled, and that they work in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.programs import Ladder
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.sampling import GREEDY, Sampling
from tests.engines import answer, counted_compiles, drawn, make_engine, make_request

CONTEXT = 100


@pytest.fixture(scope="module")
def engine(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    return make_engine(tiny_params, tiny_config, context=CONTEXT)


# --- when ---


@pytest.fixture
def compiles() -> Iterator[list[str]]:
    with counted_compiles() as seen:
        yield seen


def test_nothing_compiles_after_the_first_answer_of_a_bucket(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, compiles: list[str]
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=CONTEXT)
    ids, embeds = prompts[0]

    def ask(first: int, length: int, **changes: Any) -> None:
        """A prompt of some length, with the picture or none; the first token is new: nothing is continued."""
        shown = changes.pop("shown", True)
        picture = ids if shown else []
        filled = [first, *range(60, 60 + length - 1 - len(picture)), *picture]
        answer(fresh, (filled, embeds if shown else None), **changes)

    # Another length, another answer length, a picture or none: the same size of 56, the same places (the context).
    ask(1, 52)
    assert compiles, "the listener hears nothing; the test shows nothing"
    compiles.clear()
    ask(2, 52, steps=3)
    ask(3, 49, steps=7, shown=False)
    ask(4, 56, stop_tokens={1})
    assert compiles == []
    ask(5, 70, steps=3)
    assert compiles, "a new size is a new program"
    compiles.clear()
    ask(6, 90, steps=2)
    ask(7, 55, shown=False)
    assert compiles == []


def test_nothing_compiles_for_further_pictures(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, compiles: list[str]
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=CONTEXT)
    slots = tiny_config.num_image_tokens
    pixels = np.zeros((1, *[tiny_config.vit.image_size] * 2, 3), np.float32)
    shown = [fresh.encode_images(pixels)[0]]
    answer(fresh, ([*range(100, 161)], None))  # not one picture yet
    assert compiles
    compiles.clear()
    most = 64 // slots
    for pictures in (1, 2, 3, most):
        shown += [fresh.encode_images(pixels)[0]] * (pictures - len(shown))
        images = [IMAGE_TOKEN_ID] * (slots * pictures)
        ids = [pictures, *[*range(60), *images, 5][-60:]]  # always of the size 64, never continued
        if ids.count(IMAGE_TOKEN_ID) == slots * pictures:
            # They stay on the device; then as NumPy, which need not be whole pictures.
            fresh.generate([Request(prompt=ids, image_embeds=shown[:pictures], max_new_tokens=3)])
        ids[0] += 100
        answer(fresh, (ids, np.concatenate(shown)[: ids.count(IMAGE_TOKEN_ID)]), steps=3)
    assert compiles == []


def test_nothing_compiles_for_other_settings_of_an_answer(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, compiles: list[str]
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=CONTEXT)
    answer(fresh, prompts[0], sampling=drawn(0))
    answer(fresh, prompts[0], sampling=GREEDY)
    assert compiles, "the listener hears nothing; the test shows nothing"
    compiles.clear()
    for changed in (
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 0},
        {"top_k": 7, "top_p": 0.1},
        {"top_p": 1.0},
        {"repetition_penalty": 1.3},
        {"min_p": 0.2, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": ((4, 2.0),)},
    ):
        answer(fresh, prompts[0], sampling=drawn(9, **changed), written=[1])
    answer(fresh, prompts[0], sampling=Sampling(repetition_penalty=2.0), steps=4)
    assert compiles == []


@pytest.mark.parametrize("name", ["insert", "decode", "extend", "move"])
def test_the_cache_is_updated_in_place(
    name: str, tiny_params: Any, tiny_config: ModelConfig
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=4)
    long = [5] * 40
    fresh.generate([make_request((long, None), steps=n) for n in (2, 3, 20)])
    fresh.generate([make_request(([*long, 5, 5, 9], None), steps=2)])
    program = fresh._runner.programs._found[name, fresh._runner.programs.keys(name)[0]]
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(fresh._state.caches))
    memory = program.compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    # Nothing beside it is as large as one layer's keys: no copy of the cache is made on the way.
    assert memory.temp_size_in_bytes < fresh._state.caches[0].k.nbytes or name != "decode"


def test_a_step_gives_the_old_state_away(engine: Engine, prompts: Any) -> None:
    generation = engine.submit(make_request(prompts[0]))[0]
    engine.step()
    before = engine._state
    places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(before.caches)}
    engine.step()
    after = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._state.caches)}
    assert after == places
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.caches))
    engine.cancel(generation)


@pytest.fixture(scope="module")
def roomy(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    config = dataclasses.replace(
        tiny_config, llama=dataclasses.replace(tiny_config.llama, max_positions=2048)
    )
    return make_engine(tiny_params, config, context=1100, num_slots=2)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, 32),
        (32, 32),
        (33, 40),
        (49, 56),
        (57, 64),
        (65, 96),
        (97, 128),
        (129, 192),
        (513, 768),
        (1025, 1100),
    ],
)
def test_prompts_are_padded_to_powers_of_two_and_halfway_up_to_the_context(
    length: int, expected: int, roomy: Engine
) -> None:
    assert roomy._runner.prompt_sizes.fit(length) == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 128), (129, 256), (257, 512), (1024, 1024), (1025, 1100)]
)
def test_an_answer_reads_a_power_of_two_of_slots_up_to_the_context(
    length: int, expected: int, roomy: Engine
) -> None:
    assert roomy._runner.place_sizes.fit(length) == expected


def test_an_answer_that_reads_few_slots_is_the_one_that_reads_all_of_them(
    roomy: Engine, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawn: left to itself the tiny model repeats one token, whatever part of the prompt it can see.
    sampling = drawn(4, top_k=0, top_p=1.0)
    few = answer(roomy, prompts[0], steps=20, sampling=sampling)
    assert roomy._runner.place_sizes.fit(len(prompts[0][0]) + 20) < roomy.context
    monkeypatch.setattr(roomy._runner, "place_sizes", Ladder((roomy.context,)))
    assert few == answer(roomy, prompts[0], steps=20, sampling=sampling)
