"""Our side of the inference benchmarks: the engine of the package, driven as the product drives it, with a clock.

For: `inference_cpu.py` and `inference_gpu.py`. Not for: what is compared with what.

A free slot remembers its last prompt and continues from there, so whoever calls these functions in a row must give
prompts that begin differently; otherwise the second call reads nothing and is timed as if it had.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import jax
import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Generation, Request
from minigpt4_jax.models.layout import DISK, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import Params


def on_device(params: Params, layout: Layout, config: ModelConfig) -> Params:
    """A tree in the layout `DISK`, converted and on the device, for any number of engines."""
    moved: Params = jax.device_put(convert_layout(params, DISK, layout, llama=config.llama))
    return moved


def first_token_s(engine: Engine, request: Request) -> float:
    """Seconds from handing in one request until its first token is on the host."""
    start = time.perf_counter()
    (generation,) = engine.submit(request)
    _run_until(engine, [generation], tokens=1)
    seconds = time.perf_counter() - start
    engine.cancel(generation)
    return seconds


def encode_s(engine: Engine, images: np.ndarray) -> float:
    """Seconds until the embeddings of these pictures are on the device."""
    start = time.perf_counter()
    jax.block_until_ready(engine.encode_images(images))
    return time.perf_counter() - start


def picture_to_token_s(engine: Engine, image: np.ndarray, prompt: Sequence[int]) -> float:
    """Seconds from one picture `[1, H, W, 3]` and a prompt to the first token."""
    start = time.perf_counter()
    embeds = engine.encode_images(image)
    encoded = time.perf_counter() - start  # dispatched: the device goes on by itself
    return encoded + first_token_s(
        engine, Request(prompt=prompt, image_embeds=embeds, max_new_tokens=1)
    )


def decode_s(engine: Engine, running: Sequence[Generation], *, steps: int) -> tuple[float, float]:
    """Seconds that `steps` steps take with all these requests under way, and tokens that a row had on average by then.

    They were just submitted and ask for `room` tokens. The clock starts when every answer has two tokens, because they
    may begin one after the other, and stops when the slowest has `steps` more; tokens beyond that are counted out of
    the time.
    """
    _run_until(engine, running, tokens=2)
    before = [len(g.ids) for g in running]
    start = time.perf_counter()
    _run_until(engine, running, tokens=max(before) + steps)
    seconds = time.perf_counter() - start
    counted = sum(len(g.ids) for g in running) - sum(before)
    filled = sum(g.length + (len(g.ids) + had) / 2 for g, had in zip(running, before, strict=True))
    for generation in running:
        engine.cancel(generation)
    return seconds * steps * len(running) / counted, filled / len(running)


def room(steps: int, *, apart: int) -> int:
    """Tokens to ask for, so that the first answer to begin does not end before `decode_s` has its steps.

    `apart` requests begin one after the other; one, where all begin at once.
    """
    return steps + 2 * apart + 6


def answer_all(
    engine: Engine,
    images: np.ndarray,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
) -> list[list[int]]:
    """Encodes one picture per prompt, hands all in, runs to the end of the last answer."""
    requests = [
        Request(prompt=prompt, image_embeds=[embeds], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
        for prompt, embeds in zip(prompts, engine.encode_images(images), strict=True)
    ]  # fmt: skip
    return [generation.ids for generation in engine.generate(requests)]


def _run_until(engine: Engine, generations: Sequence[Generation], *, tokens: int) -> None:
    """Runs the loop until every answer has so many tokens.

    Raises:
        ValueError: one ended before; or the device's error, if there was one.
    """
    while any(len(generation.ids) < tokens for generation in generations):
        for generation in generations:
            if generation.error is not None:
                raise generation.error
            if generation.finished and len(generation.ids) < tokens:
                raise ValueError(f"An answer ended after {len(generation.ids)} of {tokens} tokens.")
        engine.step()
