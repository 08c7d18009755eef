"""Which programs are compiled before requests come, or beside them: the core, which any request can be served with, and
the other sizes.

A request takes the smallest size that holds it, so the core is little: the largest size of everything, and what one
question about one picture needs. Everything else only makes requests cheaper.
"""

from __future__ import annotations

import itertools

import numpy as np

from minigpt4_jax.generation.programs import Size
from minigpt4_jax.generation.runner import ANY_REQUEST, Runner
from minigpt4_jax.generation.state import SlotState

USUAL_PROMPT = 128
"""Tokens that a question about one picture fits in."""


def core_sizes(runner: Runner) -> list[Size]:
    """What must be there before the first request."""
    context = runner.place_sizes.steps[-1]
    prompts = {runner.prompt_sizes.fit(min(USUAL_PROMPT, context)), context}
    rows = {1, runner.row_sizes.steps[-1]}
    places = {runner.place_sizes.steps[0], context}
    return [
        ("move", ()),
        *(("decode", key) for key in itertools.product(sorted(rows), sorted(places), (0, 1))),
        *(("prefill", (1, size)) for size in sorted(prompts)),
        ("encode", (1,)),
    ]


def other_sizes(runner: Runner) -> list[Size]:
    """All other sizes, and those of the core once more."""
    decodes = itertools.product(runner.row_sizes.steps, runner.place_sizes.steps, (0, 1))
    extends = itertools.product(runner.extend_sizes.steps, runner.place_sizes.steps)
    return [
        *(("decode", key) for key in decodes),
        *(
            ("prefill", (count, size))
            for size in runner.prompt_sizes.steps
            for count in runner.read_together(size)
        ),
        *(("extend", (size, places)) for size, places in extends if size < places),
        *(("encode", (count,)) for count in runner.encoded_together),
    ]


def compile_size(runner: Runner, state: SlotState, size: Size) -> None:
    """Compiles what one size needs, a program or a few; does nothing where they are compiled already."""
    name, key = size
    if name == "move":
        runner.move_program(state)
    elif name == "decode":
        runner.decode_program(state, key)
    elif name in ("prefill", "insert"):
        batch, length = key
        runner.insert_program(state, runner.read([ANY_REQUEST], (batch, length)))
    elif name == "extend":
        padded, places = key
        runner.extend_program(state, (padded, places))
    elif name == "encode":
        side = runner.config.vit.image_size
        runner.encode_images(np.zeros((*key, side, side, 3), np.float32))
    else:
        raise ValueError(f"The program {name}{list(key)} is not one that is compiled ahead.")
