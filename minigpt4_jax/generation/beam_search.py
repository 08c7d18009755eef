"""The loop around `beam.py`: prompts in, the best answers out. A search has a cache of its own, beside the slots.

A search is a generator, so that whoever drives it decides what is done between two steps, and whether it goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from minigpt4_jax.generation.beam import BeamRules, BeamState, beam_step, rank, start_beams
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


BeamSteps = Generator[None, None, list[list[Hypothesis]]]
"""A search under way: yields between two pieces of its work, and returns the answers to each prompt, best first.
Closing it gives its memory on the device back."""


class BeamSearch:
    """The compiled functions of a search. Other prompts, stop tokens and penalties compile nothing; another number of
    beams or of places does."""

    def __init__(self, model: MiniGPT4) -> None:
        self._start = jax.jit(start_beams, static_argnames=("num_beams", "places"))
        self._step = jax.jit(functools.partial(beam_step, model=model), donate_argnums=1)
        self._rank = jax.jit(rank)

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
        dispatched: the device works on it while somebody else has the host.
        """
        state: BeamState = self._start(
            prefix.logits, prefix.caches, lengths, seen, rules, num_beams=num_beams, places=places
        )
        yield
        for _ in range(max_new_tokens - 1):
            if np.asarray(state.done).all():
                break
            state = self._step(params, state, rules)
            yield
        found = self._rank(state, rules)
        rows = jax.device_get((found.token_ids, found.lengths, found.scores))
        return [_hypotheses(*row) for row in zip(*rows, strict=True)]


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
