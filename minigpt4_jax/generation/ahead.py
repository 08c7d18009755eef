"""Which programs are compiled before requests come, or beside them: the core, which any request can be served with, and
the other sizes.

A request takes the cheapest size that holds it, so the core is little: the largest size of everything, what a dialogue
about one picture needs, and prompts in powers of two. Everything else only makes requests cheaper.
"""

from __future__ import annotations

import itertools

import numpy as np

from minigpt4_jax.generation.programs import Size, make_ladder
from minigpt4_jax.generation.runner import ANY_REQUEST, Runner
from minigpt4_jax.generation.state import SlotState

USUAL_PROMPT = 128
"""Tokens that a question about one picture fits in. Longer ones are padded to at most twice their length: on a CPU a
prompt of 2,048 takes ten seconds."""
USUAL_TURN = 64
"""Tokens that a further question fits in."""


def core_sizes(runner: Runner) -> list[Size]:
    """What must be there before the first request."""
    context = runner.place_sizes.steps[-1]
    prompts = make_ladder(USUAL_PROMPT, context).steps
    rows = {1, runner.row_sizes.steps[-1]}
    places = {runner.place_sizes.steps[0], context}
    turn = runner.extend_sizes.fit(min(USUAL_TURN, context))
    return [
        ("move", ()),
        *(("decode", key) for key in itertools.product(sorted(rows), sorted(places), (0, 1))),
        *(("prefill", (1, size)) for size in prompts),
        *([("extend", (turn, context))] if turn < context else []),
        ("encode", (1,)),
    ]


def other_sizes(runner: Runner) -> list[Size]:
    """All sizes, those of the core among them."""
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
