"""generation/decode.py: a prompt read into a cache and continued token by token is the model run over the whole."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.decode import decode_step, insert, prefill
from minigpt4_jax.generation.sampling import GREEDY, Sampling, keep_likely
from minigpt4_jax.generation.state import init_state, make_settings
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import make_model

STEPS, SLOTS, PADDED, CAPACITY = 12, 5, 64, 96
# float32 matmuls of other shapes add up in another order; logits are about 3 and go up to 15.
ATOL = 5e-5


@pytest.fixture(scope="module")
def decode(tiny_params: Any, tiny_config: ModelConfig) -> Any:
    """`(prompts, samplings) -> tokens [B, STEPS], top ids and log-probabilities [B, STEPS, N]`, by `prefill`, `insert`
    and `decode_step` and nothing else; `SLOTS` slots, of which the first ones are stepped over."""
    params = convert_layout(tiny_params, DISK, DECODE, llama=tiny_config.llama)
    model = make_model(tiny_config, layout=DECODE, dtype=jnp.float32)
    config = tiny_config.llama
    read = jax.jit(functools.partial(prefill, model=model, cache_dtype=jnp.float32))
    put = jax.jit(insert)
    step = jax.jit(
        functools.partial(decode_step, model=model), static_argnames=("rows", "places", "plain")
    )

    def run(prompts: Any, sampling: Any, *, dirt: float = 0.0, written: Any = ()) -> Any:
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        state = init_state(config, SLOTS, capacity=CAPACITY, dtype=jnp.float32)
        dirty = jax.tree.map(lambda leaf: leaf + dirt, state.caches)
        state = dataclasses.replace(state, caches=dirty)
        token_ids = np.zeros((len(prompts), PADDED), np.int32)
        images = np.zeros((len(prompts), 8, config.width), np.float32)
        lengths = np.asarray([len(ids) for ids, _ in prompts], np.int32)
        for row, (ids, embeds) in enumerate(prompts):
            token_ids[row, : len(ids)], images[row, : len(embeds)] = ids, embeds
        prefix = read(params, jnp.asarray(token_ids), jnp.asarray(images), jnp.asarray(lengths))
        firsts = []
        for row, one in enumerate(samplings):
            settings = make_settings(config, [one], max_new_tokens=STEPS, written=written)
            length = jnp.asarray(lengths[row : row + 1])
            state, chosen = put(state, prefix, jnp.int32(row), jnp.int32(row), length, settings)
            firsts.append(chosen)
        steps = [jax.tree.map(lambda *rows: np.concatenate(rows), *firsts)]
        alive = jnp.ones(SLOTS, bool)
        for _ in range(STEPS - 1):
            state, chosen = step(
                params, state, alive, rows=len(prompts), places=PADDED + STEPS, plain=False
            )
            steps.append(chosen)
        assert not np.asarray(state.active).any(), "an answer is longer than it may be"
        return tuple(
            np.stack([np.asarray(part) for part in parts], axis=1)
            for parts in zip(
                *[(c.token, c.logprobs.top_ids, c.logprobs.top) for c in steps], strict=True
            )
        )

    return run


def test_decode_matches_full_forward_token_by_token(
    decode: Any, prompts: Any, full_logits: Any
) -> None:
    tokens, top_ids, top = decode(prompts, GREEDY)
    for row, (ids, embeds) in enumerate(prompts):
        whole = full_logits([*ids, *tokens[row]], embeds)[len(ids) - 1 : -1]
        expected = np.asarray(jax.nn.log_softmax(whole))
        np.testing.assert_array_equal(tokens[row], expected.argmax(-1))
        found = np.take_along_axis(expected, top_ids[row], axis=1)
        np.testing.assert_allclose(top[row], found, rtol=0, atol=ATOL)
        np.testing.assert_allclose(top[row], -np.sort(-expected)[:, : top.shape[-1]], atol=ATOL)


def test_rows_of_different_lengths_decode_as_if_alone(decode: Any, prompts: Any) -> None:
    together, _, top = decode(prompts, GREEDY)
    assert len({len(ids) for ids, _ in prompts}) > 1
    for row, prompt in enumerate(prompts):
        alone, _, alone_top = decode([prompt], GREEDY)
        np.testing.assert_array_equal(together[row], alone[0])
        np.testing.assert_allclose(top[row], alone_top[0], rtol=0, atol=ATOL)


def test_what_was_in_the_cache_before_does_not_matter(decode: Any, prompts: Any) -> None:
    clean, dirty = decode(prompts, GREEDY), decode(prompts, GREEDY, dirt=1e3)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[2], dirty[2])


def test_the_repetition_penalty_counts_every_token_of_the_answer(
    decode: Any, prompts: Any, full_logits: Any
) -> None:
    penalty = 1.5
    tokens, _, top = decode(prompts, Sampling(repetition_penalty=penalty))
    greedy, _, _ = decode(prompts, GREEDY)
    for row, (ids, embeds) in enumerate(prompts):
        written: list[int] = []
        for step in range(STEPS):
            plain = full_logits([*ids, *written], embeds)[-1].copy()
            # The log-probabilities that are handed out are those before the penalty.
            best = jax.nn.log_softmax(plain).max()
            np.testing.assert_allclose(top[row, step, 0], best, rtol=0, atol=ATOL)
            for token in set(written):
                plain[token] = (
                    plain[token] * penalty if plain[token] < 0 else plain[token] / penalty
                )
            written.append(int(plain.argmax()))
        np.testing.assert_array_equal(tokens[row], written)
    assert (tokens != greedy).any(), "the penalty changed nothing here; the test shows nothing"


def test_a_penalty_starts_from_what_counts_as_written(decode: Any, prompts: Any) -> None:
    greedy, _, _ = decode(prompts[:1], GREEDY)
    best = int(greedy[0, 0])
    penalized, _, _ = decode(prompts[:1], Sampling(repetition_penalty=1e6), written=(best,))
    assert penalized[0, 0] != best


def test_a_drawn_answer_is_the_draw_from_the_full_forward(
    decode: Any, prompts: Any, full_logits: Any
) -> None:
    seeds = [7, 8, 9, 2**32 - 1]
    knobs: dict[str, Any] = {"temperature": 1.7, "top_k": 40, "top_p": 0.95}
    tokens, _, _ = decode(prompts, [Sampling(**knobs, seed=seed) for seed in seeds])
    greedy, _, _ = decode(prompts, GREEDY)
    assert (tokens != greedy).mean() > 0.5, "nothing was drawn; the test shows nothing"
    top_k, top_p = jnp.full(STEPS, 40, jnp.int32), jnp.full(STEPS, 0.95, jnp.float32)
    for row, (ids, embeds) in enumerate(prompts):
        whole = full_logits([*ids, *tokens[row]], embeds)[len(ids) - 1 : -1]
        likely = keep_likely(jnp.asarray(whole) / 1.7, top_k=top_k, top_p=top_p)
        for step in range(STEPS):
            # The place where the token will stand, whatever the padding.
            key = jax.random.fold_in(jax.random.key(seeds[row]), len(ids) + step)
            assert tokens[row, step] == jax.random.categorical(key, likely[step])


def test_rows_with_settings_of_their_own_decode_as_if_alone(decode: Any, prompts: Any) -> None:
    settings = [
        GREEDY,
        Sampling(temperature=1.3, seed=5),
        Sampling(repetition_penalty=1.7, frequency_penalty=0.3),
        Sampling(temperature=0.9, top_k=7, min_p=0.01, presence_penalty=0.5, seed=9),
    ]
    together, _, _ = decode(prompts, settings)
    for row in range(len(prompts)):
        alone, _, _ = decode(prompts[row : row + 1], settings[row])
        np.testing.assert_array_equal(together[row], alone[0])


def test_image_embeddings_reach_the_answer(decode: Any, prompts: Any) -> None:
    (ids, embeds), *_ = prompts
    _, _, before = decode([(ids, embeds)], GREEDY)
    for place in range(len(embeds)):
        changed = embeds.copy()
        changed[place] += 1
        _, _, after = decode([(ids, changed)], GREEDY)
        assert np.abs(after[0, 0] - before[0, 0]).max() > 1e-2
