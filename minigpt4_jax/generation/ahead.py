"""Which programs are compiled before requests come: the core that any request can be served with, and the rest.

A request takes the smallest size that holds it, so the core is little: the largest size of everything, and what one
question about one picture needs. Everything else only makes requests cheaper.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minigpt4_jax.generation.runner import ANY_REQUEST, READ_TOGETHER, Runner
from minigpt4_jax.generation.state import SlotState

USUAL_PROMPT = 128
"""Tokens that a question about one picture fits in."""

Job = Callable[[], Any]
"""Compiles a program or two; does nothing where they are compiled already."""


def core_jobs(runner: Runner, state: SlotState) -> list[Job]:
    """What must be there before the first request."""
    context = runner.place_sizes.steps[-1]
    prompts = {runner.prompt_sizes.fit(min(USUAL_PROMPT, context)), context}
    rows = {1, runner.row_sizes.steps[-1]}
    places = {runner.place_sizes.steps[0], context}
    return _jobs(
        runner,
        state,
        prompts=[(1, size) for size in sorted(prompts)],
        extends=[],
        decodes=list(itertools.product(sorted(rows), sorted(places), (0, 1))),
        encodes=[1],
    )


def other_jobs(runner: Runner, state: SlotState) -> list[Job]:
    """All other sizes."""
    together = [count for count in READ_TOGETHER if count <= runner.row_sizes.steps[-1]]
    return _jobs(
        runner,
        state,
        prompts=list(itertools.product(together, runner.prompt_sizes.steps)),
        extends=[
            (size, places)
            for size in runner.extend_sizes.steps
            for places in runner.place_sizes.steps
            if size < places
        ],
        decodes=list(itertools.product(runner.row_sizes.steps, runner.place_sizes.steps, (0, 1))),
        encodes=runner.encoded_together,
    )


def _jobs(
    runner: Runner,
    state: SlotState,
    *,
    prompts: Sequence[tuple[int, int]],
    extends: Sequence[tuple[int, int]],
    decodes: Sequence[tuple[int, int, int]],
    encodes: Sequence[int],
) -> list[Job]:
    side = runner.config.vit.image_size

    def read(key: tuple[int, int]) -> None:
        runner.insert_program(state, runner.read([ANY_REQUEST], key))

    def encode(count: int) -> None:
        runner.encode_images(np.zeros((count, side, side, 3), np.float32))

    return [
        functools.partial(runner.move_program, state),
        *(functools.partial(runner.decode_program, state, key) for key in decodes),
        *(functools.partial(read, key) for key in prompts),
        *(functools.partial(runner.extend_program, state, key) for key in extends),
        *(functools.partial(encode, count) for count in encodes),
    ]
