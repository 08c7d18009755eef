"""The oracle of every generation test: the whole sequence at once, no cache, plain layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import make_model

LENGTH = 128
FullLogits = Callable[[Sequence[int], np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def full_logits(tiny_params: Any, tiny_config: ModelConfig) -> FullLogits:
    """`(token_ids, image_embeds [R, D]) -> logits [S, V]` of one sequence, by the model without a cache."""
    model = make_model(tiny_config, layout=DISK, dtype=jnp.float32)

    @jax.jit
    def run(token_ids: jax.Array, image_embeds: jax.Array, attention_mask: jax.Array) -> jax.Array:
        variables = {"params": tiny_params}
        embeds = model.apply(variables, token_ids, image_embeds, method="embed_prompt")
        hidden, _, _ = model.apply(
            variables,
            embeds,
            positions=jnp.arange(LENGTH)[None],
            mask=make_causal_mask(attention_mask),
            caches=None,
            method="decode",
        )
        return model.apply(variables, hidden, method="head")

    def call(token_ids: Sequence[int], image_embeds: np.ndarray) -> np.ndarray:
        ids = np.zeros((1, LENGTH), np.int32)
        ids[0, : len(token_ids)] = token_ids
        rows = np.zeros((1, 16, tiny_config.llama.width), np.float32)
        rows[0, : len(image_embeds)] = image_embeds
        mask = jnp.arange(LENGTH)[None] < len(token_ids)
        return np.asarray(run(jnp.asarray(ids), jnp.asarray(rows), mask))[0, : len(token_ids)]

    return call


Prompt = tuple[list[int], np.ndarray]


@pytest.fixture(scope="session")
def prompts(tiny_config: ModelConfig) -> list[Prompt]:
    """Prompts of different lengths with one picture, two pictures and none, and their image embeddings."""
    rng = np.random.default_rng(10)
    slots = [IMAGE_TOKEN_ID] * tiny_config.num_image_tokens

    def text(length: int) -> list[int]:
        return [int(token) for token in rng.integers(0, tiny_config.llama.vocab_size, length)]

    def rows(pictures: int) -> np.ndarray:
        shape = (pictures * tiny_config.num_image_tokens, tiny_config.llama.width)
        return rng.normal(size=shape).astype(np.float32)

    return [
        ([*text(3), *slots, *text(20)], rows(1)),
        ([*slots, *text(1), *slots, *text(30)], rows(2)),
        (text(5), rows(0)),
        ([*text(40), *slots, *text(15)], rows(1)),
    ]
