"""The loop around `beam.py`: prompts in, the best answers out. A search has a cache of its own, beside the slots.

A search is a generator, so that whoever drives it decides what is done between two steps, and whether it goes on.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from minigpt4_jax.generation.beam import BeamRules, BeamState, beam_step, rank, start_beams
from minigpt4_jax.generation.programs import Program, compile_program
from minigpt4_jax.generation.state import Prefix
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params

LENGTH_BEFORE = 1
"""What the length of an answer counts in a beam search before its first token: the original's stand-in for a prompt."""


class Hypothesis(NamedTuple):
    """One of the answers that a beam search found."""

    ids: list[int]
    """The stop token included if one ends it."""
    score: float
    """Sum of the log-probabilities over `(1 + ids without the stop token) ** length_penalty`; higher is better."""


WAIT_S = 0.005
"""What a step of somebody else may be late while the search waits for a compiler."""
MOST_KEPT = 24
"""Compiled functions that are kept, three or four for each number of beams and of places: on a CPU each takes up to 90
MB of the process."""

BeamSteps = Generator[None, None, list[list[Hypothesis]]]
"""A search under way: yields between two pieces of its work, and returns the answers to each prompt, best first.
Closing it gives its memory on the device back."""


class BeamSearch:
    """The compiled functions of a search. Other prompts, stop tokens and penalties compile nothing; another number of
    beams or of places or another padded length does, in a thread: seconds in which whoever drives the search can do
    other work."""

    def __init__(self, model: MiniGPT4) -> None:
        self._function = functools.partial(beam_step, model=model)
        self._compiler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="beams-compiler")
        self._compiled: OrderedDict[Hashable, Future[Program]] = OrderedDict()

    def steps(
        self,
        params: Params,
        prefix: Prefix,
        lengths: Int[np.ndarray, " B"],
        seen: Bool[np.ndarray, "B V"],
        rules: BeamRules,
        *,
        num_beams: int,
        places: int,
        max_new_tokens: int,
    ) -> BeamSteps:
        """The `num_beams` best answers to each prompt of `prefix`, best first; fewer where there are not as many.

        Every step waits for the one before it, so that Ctrl-C ends a search between two steps. Yields where a step was
        dispatched: the device works on it while somebody else has the host; and, `WAIT_S` apart, while something is
        compiled.
        """
        args = (prefix.logits, prefix.caches, lengths, seen, rules)
        function = functools.partial(start_beams, num_beams=num_beams, places=places)
        start = yield from self._program(("start", num_beams, places), function, args)
        state: BeamState = start(*args)
        yield
        for _ in range(max_new_tokens - 1):
            if np.asarray(state.done).all():
                break
            # Looked up each time: on a mesh a step may lay the state out otherwise than it was.
            step = yield from self._program(
                ("step",), self._function, (state, rules), fixed=(params,), donate=(1,)
            )
            state = self._step(step, params, state, rules)
            yield
        last = yield from self._program(("rank",), rank, (state, rules))
        found = last(state, rules)
        rows = jax.device_get((found.token_ids, found.lengths, found.scores))
        return [_hypotheses(*row) for row in zip(*rows, strict=True)]

    def _step(
        self, program: Program, params: Params, state: BeamState, rules: BeamRules
    ) -> BeamState:
        found: BeamState = program(params, state, rules)
        return found

    def _program(
        self,
        name: tuple[str | int, ...],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        fixed: tuple[Any, ...] = (),
        donate: tuple[int, ...] = (),
    ) -> Generator[None, None, Program]:
        """A function, by its name and what is static in it, compiled for arguments like these, `fixed` before them.
        Raises what the compiler raises; it is tried again then."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = (name, tree, shapes)
        found = self._compiled.get(key)
        if found is None:
            found = self._compiler.submit(compile_program, function, (*fixed, *args), donate=donate)
            self._compiled[key] = found
        self._compiled.move_to_end(key)
        while len(self._compiled) > MOST_KEPT:
            self._compiled.popitem(last=False)
        while not found.done():
            wait([found], timeout=WAIT_S)
            if not found.done():
                yield
        if found.exception() is not None:
            self._compiled.pop(key, None)
        return found.result()


def _hypotheses(
    token_ids: Int[np.ndarray, "W A"],
    lengths: Int[np.ndarray, " W"],
    scores: Float[np.ndarray, " W"],
) -> list[Hypothesis]:
    return [
        Hypothesis(ids[:length].tolist(), float(score))
        for ids, length, score in zip(token_ids, lengths, scores, strict=True)
        if score > -np.inf
    ]
