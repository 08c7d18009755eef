"""generation/decode.py: a prompt read into a cache and continued token by token is the model run over the whole."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.decode import DecodeState, decode_step, prefill
from minigpt4_jax.generation.sampling import GREEDY, Sampling, keep_likely, make_sampling
from minigpt4_jax.models.kv_cache import init_cache
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import make_model

STEPS, SLOTS, PADDED = 12, 96, 64
# float32 matmuls of other shapes add up in another order; logits are about 3 and go up to 15.
ATOL = 5e-5


@pytest.fixture(scope="module")
def decode(tiny_params: Any, tiny_config: ModelConfig) -> Any:
    """`(prompts, sampling) -> tokens [B, STEPS], logits [B, STEPS, V]`, by the two functions and nothing else."""
    params = convert_layout(tiny_params, DISK, DECODE, llama=tiny_config.llama)
    model = make_model(tiny_config, layout=DECODE, dtype=jnp.float32)
    vocab = tiny_config.llama.vocab_size
    first = jax.jit(functools.partial(prefill, model=model))
    step = jax.jit(functools.partial(decode_step, model=model))

    def run(prompts: Any, sampling: Sampling, *, dirt: float = 0.0, written: Any = False) -> Any:
        token_ids = np.zeros((len(prompts), PADDED), np.int32)
        images = np.zeros((len(prompts), 8, tiny_config.llama.width), np.float32)
        for row, (ids, embeds) in enumerate(prompts):
            token_ids[row, : len(ids)], images[row, : len(embeds)] = ids, embeds
        caches = init_cache(tiny_config.llama, len(prompts), capacity=SLOTS, dtype=jnp.float32)
        state, logits = first(
            params,
            jax.tree.map(lambda leaf: leaf + dirt, caches),
            jnp.asarray(token_ids),
            jnp.asarray(images),
            jnp.asarray([len(ids) for ids, _ in prompts], jnp.int32),
            jnp.zeros((len(prompts), vocab), bool)
            | jnp.broadcast_to(written, (len(prompts), vocab)),
            sampling=sampling,
        )
        states: list[DecodeState] = [state]
        chosen_from = [logits]
        for _ in range(STEPS - 1):
            state, logits = step(params, state, sampling=sampling)
            states.append(state)
            chosen_from.append(logits)
        tokens = np.stack([np.asarray(state.token) for state in states], axis=1)
        return tokens, np.stack([np.asarray(logits) for logits in chosen_from], axis=1)

    return run


def test_decode_matches_full_forward_token_by_token(
    decode: Any, prompts: Any, full_logits: Any
) -> None:
    tokens, logits = decode(prompts, GREEDY)
    for row, (ids, embeds) in enumerate(prompts):
        whole = full_logits([*ids, *tokens[row]], embeds)
        expected = whole[len(ids) - 1 : -1]
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=ATOL)
        np.testing.assert_array_equal(tokens[row], expected.argmax(-1))


def test_rows_of_different_lengths_decode_as_if_alone(decode: Any, prompts: Any) -> None:
    together, logits = decode(prompts, GREEDY)
    assert len({len(ids) for ids, _ in prompts}) > 1
    for row, prompt in enumerate(prompts):
        alone, alone_logits = decode([prompt], GREEDY)
        np.testing.assert_array_equal(together[row], alone[0])
        np.testing.assert_allclose(logits[row], alone_logits[0], rtol=0, atol=ATOL)


def test_what_was_in_the_cache_before_does_not_matter(decode: Any, prompts: Any) -> None:
    clean, dirty = decode(prompts, GREEDY), decode(prompts, GREEDY, dirt=1e3)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])


def test_the_repetition_penalty_counts_every_token_of_the_answer(
    decode: Any, prompts: Any, full_logits: Any
) -> None:
    penalty = 1.5
    tokens, logits = decode(prompts, make_sampling(repetition_penalty=penalty))
    greedy, _ = decode(prompts, GREEDY)
    for row, (ids, embeds) in enumerate(prompts):
        written: list[int] = []
        for step in range(STEPS):
            plain = full_logits([*ids, *written], embeds)[-1].copy()
            # The logits that are handed out are those before the penalty.
            np.testing.assert_allclose(logits[row, step], plain, rtol=0, atol=ATOL)
            for token in set(written):
                plain[token] = (
                    plain[token] * penalty if plain[token] < 0 else plain[token] / penalty
                )
            written.append(int(plain.argmax()))
        np.testing.assert_array_equal(tokens[row], written)
    assert (tokens != greedy).any(), "the penalty changed nothing here; the test shows nothing"


def test_a_penalty_starts_from_what_counts_as_written(decode: Any, prompts: Any) -> None:
    greedy, logits = decode(prompts, GREEDY)
    best = greedy[0, 0]
    written = np.arange(logits.shape[-1]) == best
    penalized, _ = decode(prompts[:1], make_sampling(repetition_penalty=1e6), written=written)
    assert logits[0, 0, best] > 0
    assert penalized[0, 0] != best


def test_a_drawn_answer_is_the_draw_from_the_full_forward(
    decode: Any, prompts: Any, full_logits: Any
) -> None:
    seeds = [7, 8, 9, 2**32 - 1]
    knobs: dict[str, Any] = {"temperature": 1.7, "top_k": 40, "top_p": 0.95}
    tokens, _ = decode(prompts, make_sampling(**knobs, seeds=seeds))
    greedy, _ = decode(prompts, GREEDY)
    assert (tokens != greedy).mean() > 0.5, "nothing was drawn; the test shows nothing"
    for row, (ids, embeds) in enumerate(prompts):
        whole = full_logits([*ids, *tokens[row]], embeds)[len(ids) - 1 : -1]
        for step, logits in enumerate(whole):
            likely = keep_likely(jnp.asarray(logits[None]) / 1.7, top_k=40, top_p=0.95)[0]
            # The place where the token will stand, whatever the padding.
            key = jax.random.fold_in(jax.random.key(seeds[row]), len(ids) + step)
            assert tokens[row, step] == jax.random.categorical(key, likely)


def test_image_embeddings_reach_the_answer(decode: Any, prompts: Any) -> None:
    (ids, embeds), *_ = prompts
    _, before = decode([(ids, embeds)], GREEDY)
    for place in range(len(embeds)):
        changed = embeds.copy()
        changed[place] += 1
        _, after = decode([(ids, changed)], GREEDY)
        assert np.abs(after[0, 0] - before[0, 0]).max() > 1e-2
