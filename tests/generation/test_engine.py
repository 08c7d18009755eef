"""generation/engine.py: one set of compiled functions, a cache that is reused in place, errors in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig, UserError
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.sampling import GREEDY, Sampling, make_sampling
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import make_model

CONTEXT = 100
NEVER: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def engine(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    return Engine(tiny_params, tiny_config, dtype=jnp.float32, context=CONTEXT)


def answer(engine: Engine, prompt: Any, *, steps: int = 10, **changes: Any) -> list[int]:
    ids, embeds = prompt
    settings: dict[str, Any] = {"stop_tokens": NEVER, "sampling": GREEDY, **changes}
    return list(engine.stream(ids, embeds, max_new_tokens=steps, **settings))


@pytest.fixture(scope="module")
def answers(engine: Engine, prompts: Any) -> list[list[int]]:
    """The greedy answers to `prompts`, one at a time."""
    return [answer(engine, prompt) for prompt in prompts]


def test_a_streamed_answer_is_what_the_full_model_says(
    answers: list[list[int]], prompts: Any, full_logits: Any
) -> None:
    for (ids, embeds), found in zip(prompts, answers, strict=True):
        whole = full_logits([*ids, *found], embeds)
        assert found == whole[len(ids) - 1 : -1].argmax(-1).tolist()


def test_many_answers_at_once_are_the_answers_one_by_one(
    engine: Engine, prompts: Any, answers: list[list[int]]
) -> None:
    found = engine.generate(
        [ids for ids, _ in prompts],
        [embeds if len(embeds) else None for _, embeds in prompts],
        max_new_tokens=10,
        stop_tokens=NEVER,
        sampling=GREEDY,
    )
    assert found == answers


def test_a_stop_token_ends_an_answer_and_is_in_it(
    engine: Engine, prompts: Any, answers: list[list[int]]
) -> None:
    for prompt, whole in zip(prompts, answers, strict=True):
        stop = whole[4]
        end = whole.index(stop) + 1
        assert answer(engine, prompt, stop_tokens={stop}) == whole[:end]


def test_a_row_that_stopped_does_not_stop_the_others(
    engine: Engine, prompts: Any, answers: list[list[int]]
) -> None:
    stop = answers[0][2]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in answers]
    assert len({len(row) for row in expected}) > 1
    found = engine.generate(
        [ids for ids, _ in prompts],
        [embeds for _, embeds in prompts],
        max_new_tokens=10,
        stop_tokens=[stop],
        sampling=GREEDY,
    )
    assert found == expected


def test_one_token_can_be_asked_for(engine: Engine, prompts: Any, answers: Any) -> None:
    assert answer(engine, prompts[0], steps=1) == answers[0][:1]


def test_the_penalty_is_part_of_the_call(engine: Engine, prompts: Any, answers: Any) -> None:
    penalty = make_sampling(repetition_penalty=1.5)
    penalized = [answer(engine, prompt, sampling=penalty) for prompt in prompts]
    assert penalized != answers
    assert [answer(engine, prompt) for prompt in prompts] == answers


def test_what_counts_as_written_is_penalized_from_the_first_token(
    engine: Engine, prompts: Any, answers: Any
) -> None:
    first = answers[0][0]
    penalty = make_sampling(repetition_penalty=1e6)
    assert answer(engine, prompts[0], steps=1, sampling=penalty) == [first]
    assert answer(engine, prompts[0], steps=1, sampling=penalty, written=[first]) != [first]
    assert answer(engine, prompts[0], steps=1, sampling=penalty, written=[first ^ 1]) == [first]


# --- chance ---


def drawn(*seeds: int, **changes: Any) -> Sampling:
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 100, "top_p": 0.98, **changes}
    return make_sampling(**settings, seeds=seeds)


def test_the_same_seed_gives_the_same_answer_whatever_the_batch(
    engine: Engine, prompts: Any, answers: Any
) -> None:
    seeds = [3, 3, 2**32 - 1, 0]
    alone = [
        answer(engine, prompt, sampling=drawn(seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert alone != answers
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        found = engine.generate(
            [prompts[row][0] for row in order],
            [prompts[row][1] for row in order],
            max_new_tokens=10,
            stop_tokens=NEVER,
            sampling=drawn(*[seeds[row] for row in order]),
        )
        assert found == [alone[row] for row in order]


def test_another_seed_gives_another_answer(engine: Engine, prompts: Any) -> None:
    found = {tuple(answer(engine, prompts[0], sampling=drawn(seed))) for seed in range(5)}
    assert len(found) == 5


def test_a_draw_from_one_token_is_greedy(engine: Engine, prompts: Any, answers: Any) -> None:
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.01}):
        assert answer(engine, prompts[0], sampling=drawn(5, **narrow)) == answers[0]


def test_every_row_needs_a_seed(engine: Engine, prompts: Any) -> None:
    with pytest.raises(ValueError, match="There are 1 prompts and 2 seeds; expected one seed per"):
        answer(engine, prompts[0], sampling=drawn(1, 2))


# --- compiling, memory ---


@pytest.fixture
def compiles() -> Iterator[list[str]]:
    """One entry per program that XLA compiles while the test runs."""
    seen: list[str] = []

    def listen(event: str, duration_s: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@contextmanager
def without_signature_checks() -> Iterator[None]:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_nothing_compiles_after_the_first_answer_of_a_bucket(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, compiles: list[str]
) -> None:
    fresh = Engine(tiny_params, tiny_config, dtype=jnp.float32, context=CONTEXT)
    # Another length, another answer length, a picture or none: the same bucket of 64, the same slots (the context).
    one, none = prompts[0], prompts[2]
    answer(fresh, one)
    assert compiles, "the listener hears nothing; the test shows nothing"
    compiles.clear()
    answer(fresh, one, steps=3)
    answer(fresh, none, steps=7)
    answer(fresh, (one[0] + [1] * 9, one[1]), stop_tokens={1})
    assert compiles == []
    longer = ([*one[0], *[2] * 40], one[1])
    assert fresh.bucket(len(longer[0])) > 64
    answer(fresh, longer, steps=3)
    assert compiles, "a new bucket is a new program"
    compiles.clear()
    answer(fresh, (longer[0] + [3] * 2, longer[1]), steps=2)
    answer(fresh, none)
    assert compiles == []


def test_nothing_compiles_for_further_pictures(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, compiles: list[str]
) -> None:
    fresh = Engine(tiny_params, tiny_config, dtype=jnp.float32, context=CONTEXT)
    slots = tiny_config.num_image_tokens
    pixels = np.zeros((1, *[tiny_config.vit.image_size] * 2, 3), np.float32)
    shown = [fresh.encode_images(pixels)[0]]
    answer(fresh, prompts[2])  # not one picture yet
    assert compiles
    compiles.clear()
    most = 64 // slots
    for pictures in (1, 2, 3, most):
        shown += [fresh.encode_images(pixels)[0]] * (pictures - len(shown))
        ids = [*[IMAGE_TOKEN_ID] * (slots * pictures), 5][:61]  # with 3 new tokens within 64 slots
        answer(fresh, (ids, np.concatenate(shown)[: ids.count(IMAGE_TOKEN_ID)]), steps=3)
    assert compiles == []


def test_nothing_compiles_for_other_settings_of_an_answer(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, compiles: list[str]
) -> None:
    fresh = Engine(tiny_params, tiny_config, dtype=jnp.float32, context=CONTEXT)
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
    ):
        answer(fresh, prompts[0], sampling=drawn(9, **changed), written=[1])
    answer(fresh, prompts[0], sampling=make_sampling(repetition_penalty=2.0), steps=4)
    assert compiles == []


@pytest.mark.parametrize("name", ["_prefill", "_decode_step"])
def test_the_cache_is_updated_in_place(
    name: str, engine: Engine, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(engine, name)
    aliased: list[int] = []

    def record(params: Any, caches_or_state: Any, *rest: Any, **settings: Any) -> Any:
        # `lower` rebuilds its arguments from abstract values, which the checked signatures do not know.
        with without_signature_checks():
            lowered = real.lower(params, caches_or_state, *rest, **settings)
        aliased.append(lowered.compile().memory_analysis().alias_size_in_bytes)
        given = jax.tree.leaves(getattr(caches_or_state, "caches", caches_or_state))
        before = {leaf.unsafe_buffer_pointer() for leaf in given}
        state, logits = real(params, caches_or_state, *rest, **settings)
        assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.caches)} == before
        assert all(leaf.is_deleted() for leaf in given), "the old cache can still be used"
        return state, logits

    monkeypatch.setattr(engine, name, record)
    answer(engine, prompts[0], steps=2)
    cfg = engine.config.llama
    cache_bytes = 2 * cfg.num_layers * CONTEXT * cfg.num_kv_heads * cfg.head_dim * 4
    assert aliased[0] >= cache_bytes


def test_the_cache_of_the_last_answer_serves_the_next(engine: Engine, prompts: Any) -> None:
    answer(engine, prompts[0])
    place = engine._free_caches[1][0].k.unsafe_buffer_pointer()
    answer(engine, prompts[1])
    assert engine._free_caches[1][0].k.unsafe_buffer_pointer() == place


@pytest.fixture(scope="module")
def roomy(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    config = dataclasses.replace(
        tiny_config, llama=dataclasses.replace(tiny_config.llama, max_positions=2048)
    )
    return Engine(tiny_params, config, dtype=jnp.float32, context=1100)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 64), (64, 64), (65, 96), (96, 96), (97, 128), (129, 192), (513, 768), (1025, 1100)],
)
def test_prompts_are_padded_to_powers_of_two_and_halfway_up_to_the_context(
    length: int, expected: int, roomy: Engine
) -> None:
    assert roomy.bucket(length) == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 256), (256, 256), (257, 512), (1024, 1024), (1025, 1100)]
)
def test_an_answer_reads_a_power_of_two_of_slots_up_to_the_context(
    length: int, expected: int, roomy: Engine
) -> None:
    assert roomy.slots(length) == expected


def test_an_answer_that_reads_few_slots_is_the_one_that_reads_all_of_them(
    roomy: Engine, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawn: left to itself the tiny model repeats one token, whatever part of the prompt it can see.
    sampling = drawn(4, top_k=0, top_p=1.0)
    few = answer(roomy, prompts[0], steps=20, sampling=sampling)
    assert roomy.slots(len(prompts[0][0]) + 20) < roomy.context
    monkeypatch.setattr(roomy, "slots", lambda length: roomy.context)
    assert few == answer(roomy, prompts[0], steps=20, sampling=sampling)


# --- stopped halfway ---


def test_a_closed_stream_leaves_an_engine_that_answers(
    engine: Engine, prompts: Any, answers: list[list[int]]
) -> None:
    for taken in (1, 2, 5):
        ids, embeds = prompts[0]
        stream = engine.stream(ids, embeds, max_new_tokens=10, stop_tokens=NEVER, sampling=GREEDY)
        assert [next(stream) for _ in range(taken)] == answers[0][:taken]
        stream.close()
        assert [answer(engine, prompt) for prompt in prompts] == answers


@pytest.mark.parametrize("name", ["_prefill", "_decode_step"])
def test_ctrl_c_inside_a_step_leaves_an_engine_that_answers(
    name: str,
    engine: Engine,
    prompts: Any,
    answers: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The signal is raised after the compiled call, which took the old cache, and before its result has a name.
    real = getattr(engine, name)

    def interrupted(*args: Any, **settings: Any) -> Any:
        real(*args, **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, prompts[0])
    assert answer(engine, prompts[0]) == answers[0]


def test_two_streams_side_by_side_do_not_share_a_cache(
    engine: Engine, prompts: Any, answers: list[list[int]]
) -> None:
    streams = [
        engine.stream(*prompt, max_new_tokens=10, stop_tokens=NEVER, sampling=GREEDY)
        for prompt in prompts[:2]
    ]
    turns = [[next(stream) for stream in streams] for _ in range(10)]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == answers[:2]
    for stream in streams:
        stream.close()


# --- errors and pictures ---


@pytest.mark.parametrize("rows", [0, 3, 5, 8])
def test_placeholders_and_embeddings_must_match(
    rows: int, engine: Engine, prompts: Any, tiny_config: ModelConfig
) -> None:
    ids, _ = prompts[0]
    embeds = np.zeros((rows, tiny_config.llama.width), np.float32) if rows else None
    with pytest.raises(ValueError, match=f"Prompt 0 has 4 image slots and {rows} image embeddings"):
        answer(engine, (ids, embeds))


@pytest.mark.parametrize(("length", "steps"), [(0, 5), (96, 5), (101, 1)])
def test_prompt_and_answer_must_fit_the_context(length: int, steps: int, engine: Engine) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens and {steps} new.*at most {CONTEXT}"):
        answer(engine, ([1] * length, None), steps=steps)


def test_the_context_can_be_filled_to_the_last_slot(engine: Engine, full_logits: Any) -> None:
    ids = [int(token) for token in np.random.default_rng(11).integers(0, 384, 95)]
    found = answer(engine, (ids, None), steps=5)
    expected = full_logits([*ids, *found], np.zeros((0, 32), np.float32))
    assert found == expected[94:-1].argmax(-1).tolist()


def test_a_context_beyond_the_models_positions_is_refused(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    with pytest.raises(UserError, match="context is 257; expected at most 256"):
        Engine(tiny_params, tiny_config, dtype=jnp.float32, context=257)


def test_pictures_are_encoded_as_the_model_does(any_params: Any, any_config: ModelConfig) -> None:
    size = any_config.vit.image_size
    images = np.random.default_rng(12).normal(size=(3, size, size, 3)).astype(np.float32)
    model = make_model(any_config, layout=DISK, dtype=jnp.float32)
    expected = jax.jit(
        lambda params, x: model.apply({"params": params}, x, method="encode_images")
    )(any_params, images)
    engine = Engine(any_params, any_config, dtype=jnp.float32, context=CONTEXT)
    found = engine.encode_images(images)
    assert found.dtype == np.float32
    assert found.shape == (3, any_config.num_image_tokens, any_config.llama.width)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_placeholder_is_never_answered(answers: list[list[int]]) -> None:
    assert IMAGE_TOKEN_ID not in {token for row in answers for token in row}


def test_bfloat16_generates_within_its_precision(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, full_logits: Any
) -> None:
    narrow = Engine(tiny_params, tiny_config, dtype=jnp.bfloat16, context=CONTEXT)
    ids, embeds = prompts[0]
    found = answer(narrow, prompts[0], steps=6)
    logits = full_logits([*ids, *found], embeds)[len(ids) - 1 : -1]
    # Eight bits of mantissa through two layers: the chosen token is among the best few of float32.
    gap = logits.max(-1) - np.take_along_axis(logits, np.asarray(found)[:, None], axis=1)[:, 0]
    assert gap.max() < 0.5
