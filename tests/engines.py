"""Engines for tests, and how tests ask them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout


def make_engine(params: Any, config: ModelConfig, *, context: int, **settings: Any) -> Engine:
    """From parameters as they are on disk, in float32 unless said otherwise."""
    decode = jax.tree.map(jnp.asarray, convert_layout(params, DISK, DECODE, llama=config.llama))
    return Engine(decode, config, context=context, **{"dtype": jnp.float32, **settings})


def make_request(prompt: Any, *, steps: int = 10, **changes: Any) -> Request:
    """`prompt` is `(ids, rows of image embeddings or None)`."""
    ids, embeds = prompt
    images = [] if embeds is None or not len(embeds) else [embeds]
    return Request(
        prompt=[int(i) for i in ids], image_embeds=images, max_new_tokens=steps, **changes
    )


def drawn(seed: int, **changes: Any) -> Sampling:
    """Settings of a drawn answer. Left to itself the tiny model repeats one token: nearly every test draws."""
    return Sampling(**{"temperature": 1.5, **changes}, seed=seed)


def answer(engine: Engine, prompt: Any, **changes: Any) -> list[int]:
    """The ids of one answer, alone."""
    return list(engine.stream(make_request(prompt, **changes)))


def answer_all(engine: Engine, prompts: Any, **changes: Any) -> list[list[int]]:
    """The ids of several answers, side by side."""
    found = engine.generate([make_request(prompt, **changes) for prompt in prompts])
    return [generation.ids for generation in found]


@contextmanager
def counted_compiles() -> Iterator[list[str]]:
    """One entry per program that XLA compiles inside."""
    seen: list[str] = []

    def listen(event: str, duration_s: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
