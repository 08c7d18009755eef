"""generation/engine.py: answers are those of the full model, in any company; what is refused; pictures; int8."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig, UserError
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.models.layout import DECODE_INT8, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import apply_method, make_model
from tests.engines import answer, answer_all, drawn, make_engine, make_request

CONTEXT = 100
NEVER: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def engine(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    return make_engine(tiny_params, tiny_config, context=CONTEXT)


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
    assert answer_all(engine, prompts) == answers


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
    assert answer_all(engine, prompts, stop_tokens=[stop]) == expected


def test_one_token_can_be_asked_for(engine: Engine, prompts: Any, answers: Any) -> None:
    assert answer(engine, prompts[0], steps=1) == answers[0][:1]


def test_the_penalty_is_part_of_the_call(engine: Engine, prompts: Any, answers: Any) -> None:
    penalty = Sampling(repetition_penalty=1.5)
    penalized = [answer(engine, prompt, sampling=penalty) for prompt in prompts]
    assert penalized != answers
    assert [answer(engine, prompt) for prompt in prompts] == answers


def test_what_counts_as_written_is_penalized_from_the_first_token(
    engine: Engine, prompts: Any, answers: Any
) -> None:
    first = answers[0][0]
    penalty = Sampling(repetition_penalty=1e6)
    assert answer(engine, prompts[0], steps=1, sampling=penalty) == [first]
    assert answer(engine, prompts[0], steps=1, sampling=penalty, written=[first]) != [first]
    assert answer(engine, prompts[0], steps=1, sampling=penalty, written=[first ^ 1]) == [first]


# --- chance ---


def test_the_same_seed_gives_the_same_answer_whatever_the_batch(
    engine: Engine, prompts: Any, answers: Any
) -> None:
    seeds = [3, 3, 2**32 - 1, 0]
    pairs = list(zip(prompts, seeds, strict=True))
    alone = [answer(engine, prompt, sampling=drawn(seed)) for prompt, seed in pairs]
    assert alone != answers
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        found = engine.generate(
            [make_request(pairs[row][0], sampling=drawn(pairs[row][1])) for row in order]
        )
        assert [generation.ids for generation in found] == [alone[row] for row in order]


def test_another_seed_gives_another_answer(engine: Engine, prompts: Any) -> None:
    found = {tuple(answer(engine, prompts[0], sampling=drawn(seed))) for seed in range(5)}
    assert len(found) == 5


def test_a_draw_from_one_token_is_greedy(engine: Engine, prompts: Any, answers: Any) -> None:
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.01}):
        assert answer(engine, prompts[0], sampling=drawn(5, **narrow)) == answers[0]


# --- stopped halfway ---


def test_a_closed_stream_leaves_an_engine_that_answers(
    engine: Engine, prompts: Any, answers: list[list[int]]
) -> None:
    for taken in (1, 2, 5):
        stream = engine.stream(make_request(prompts[0]))
        assert [next(stream) for _ in range(taken)] == answers[0][:taken]
        stream.close()
        assert [answer(engine, prompt) for prompt in prompts] == answers


@pytest.mark.parametrize("name", ["read", "insert", "decode"])
def test_ctrl_c_inside_a_step_leaves_an_engine_that_answers(
    name: str,
    engine: Engine,
    prompts: Any,
    answers: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The signal is raised after the compiled call, which took the old cache, and before its result has a name.
    real = getattr(engine._runner, name)

    def interrupted(*args: Any, **settings: Any) -> Any:
        real(*args, **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, prompts[0])
    assert not engine.busy
    assert answer(engine, prompts[0]) == answers[0]


def test_two_streams_side_by_side_do_not_share_a_cache(
    engine: Engine, prompts: Any, answers: list[list[int]]
) -> None:
    streams = [engine.stream(make_request(prompt)) for prompt in prompts[:2]]
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
    with pytest.raises(
        ValueError, match=f"The prompt has 4 image slots and {rows} image embeddings"
    ):
        answer(engine, (ids, embeds))


@pytest.mark.parametrize(("length", "steps"), [(96, 5), (101, 1)])
def test_prompt_and_answer_must_fit_the_context(length: int, steps: int, engine: Engine) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens and {steps} new.*at most {CONTEXT}"):
        answer(engine, ([1] * length, None), steps=steps)
    assert not engine.busy


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": (1, 384)},
        {"stop_tokens": {384}},
        {"written": [384]},
        {"sampling": Sampling(logit_bias=((384, 1.0),))},
        # The placeholder of a picture is an id of prompts alone; elsewhere it would mean the last token.
        {"stop_tokens": {IMAGE_TOKEN_ID}},
        {"written": [IMAGE_TOKEN_ID]},
        {"sampling": Sampling(logit_bias=((IMAGE_TOKEN_ID, 1.0),))},
    ],
)
def test_ids_beyond_the_vocabulary_are_refused_before_anything_runs(
    changes: Any, engine: Engine
) -> None:
    with pytest.raises(ValueError, match=r"holds the ids \[(384|-1)\]; expected 0 to 383"):
        engine.submit(Request(**{"prompt": (1,), "max_new_tokens": 1, **changes}))
    assert not engine.busy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "The prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"stop_tokens": range(17)}, "There are 17 stop tokens; expected at most 16"),
    ],
)
def test_what_no_engine_can_run_is_no_request(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": (1,), "max_new_tokens": 1, **changes})


def test_the_context_can_be_filled_to_the_last_slot(engine: Engine, full_logits: Any) -> None:
    ids = [int(token) for token in np.random.default_rng(11).integers(0, 384, 95)]
    found = answer(engine, (ids, None), steps=5)
    expected = full_logits([*ids, *found], np.zeros((0, 32), np.float32))
    assert found == expected[94:-1].argmax(-1).tolist()


def test_a_context_beyond_the_models_positions_is_refused(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    with pytest.raises(UserError, match="context is 257; expected at most 256"):
        make_engine(tiny_params, tiny_config, context=257)
    with pytest.raises(UserError, match="num_slots is 0; expected at least 1"):
        make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=0)


def test_pictures_are_encoded_as_the_model_does(any_params: Any, any_config: ModelConfig) -> None:
    size = any_config.vit.image_size
    images = np.random.default_rng(12).normal(size=(3, size, size, 3)).astype(np.float32)
    model = make_model(any_config, layout=DISK, dtype=jnp.float32)
    expected = jax.jit(
        lambda params, x: model.apply({"params": params}, x, method="encode_images")
    )(any_params, images)
    engine = make_engine(any_params, any_config, context=CONTEXT)
    found = np.stack(engine.encode_images(images))
    assert found.dtype == np.float32
    assert found.shape == (3, any_config.num_image_tokens, any_config.llama.width)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_placeholder_is_never_answered(answers: list[list[int]]) -> None:
    assert IMAGE_TOKEN_ID not in {token for row in answers for token in row}


def test_bfloat16_generates_within_its_precision(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, full_logits: Any
) -> None:
    narrow = make_engine(tiny_params, tiny_config, dtype=jnp.bfloat16, context=CONTEXT)
    ids, embeds = prompts[0]
    found = answer(narrow, prompts[0], steps=6)
    logits = full_logits([*ids, *found], embeds)[len(ids) - 1 : -1]
    # Eight bits of mantissa through two layers: the chosen token is among the best few of float32.
    gap = logits.max(-1) - np.take_along_axis(logits, np.asarray(found)[:, None], axis=1)[:, 0]
    assert gap.max() < 0.5


# --- int8 ---


@pytest.fixture(scope="module")
def int8_params(tiny_params: Any, tiny_config: ModelConfig) -> Any:
    params = convert_layout(tiny_params, DISK, DECODE_INT8, llama=tiny_config.llama)
    return jax.tree.map(jnp.asarray, params)


def test_int8_weights_answer_as_the_same_weights_without_a_cache(
    int8_params: Any, tiny_config: ModelConfig, prompts: Any, answers: list[list[int]]
) -> None:
    engine = Engine(
        int8_params, tiny_config, dtype=jnp.float32, context=CONTEXT, layout=DECODE_INT8
    )
    model = make_model(tiny_config, layout=DECODE_INT8, dtype=jnp.float32)
    kernel = int8_params["llama"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
    assert kernel.dtype == jnp.int8

    @jax.jit
    def logits(ids: jax.Array, rows: jax.Array) -> jax.Array:
        positions = jnp.arange(ids.shape[1])[None]
        embeds = apply_method(model, int8_params, "embed_prompt", ids, rows)
        hidden, _, _ = apply_method(
            model, int8_params, "decode", embeds, positions=positions,
            mask=positions[:, :, None] >= positions[:, None], caches=None,
        )  # fmt: skip
        return apply_method(model, int8_params, "head", hidden)[0]

    found = answer_all(engine, prompts)
    for (ids, embeds), tokens in zip(prompts, found, strict=True):
        rows = np.zeros((1, CONTEXT, tiny_config.llama.width), np.float32)
        rows[0, : len(embeds)] = embeds
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(ids) + len(tokens)] = [*ids, *tokens]
        whole = np.asarray(logits(padded, rows))[len(ids) - 1 : len(ids) + len(tokens) - 1]
        assert tokens == whole.argmax(-1).tolist()


def test_an_int8_cache_goes_through_every_program_and_is_updated_in_place(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any, full_logits: Any
) -> None:
    engine = make_engine(
        tiny_params, tiny_config, context=CONTEXT, num_slots=2, cache_dtype=jnp.int8
    )
    leaves = jax.tree.leaves(engine._state.caches)
    assert {str(leaf.dtype) for leaf in leaves} == {"int8", "float32"}
    long = ([*range(40)], None)
    asked = [*prompts, long, ([*long[0], 7, 8], None)]
    for prompt in asked:
        (found,) = engine.generate([make_request(prompt, logprobs=True)])
        ids, embeds = prompt
        rows = np.zeros((0, 32), np.float32) if embeds is None else embeds
        whole = full_logits([*ids, *found.ids], rows)[len(ids) - 1 : -1]
        expected = np.asarray(jax.nn.log_softmax(whole))
        for row, token, said in zip(expected, found.ids, found.logprobs, strict=True):
            assert said.chosen == pytest.approx(row[token], abs=0.1)
    assert engine.counters.extends == 1
    for name in ("decode", "insert", "extend"):
        program = engine._runner.programs._found[name, engine._runner.programs.keys(name)[0]]
        cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._state.caches))
        assert program.compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
