"""From logits to the next token: greedy, with the repetition penalty. Pure functions; runs inside the decode step."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.config import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; static under jit."""

    repetition_penalty: float
    """1.0 leaves the logits alone; above 1 tokens that were already written become less likely."""

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; expected a number above 0 (1.0 is off)."
            )


GREEDY = Sampling(repetition_penalty=1.0)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], *, penalty: float
) -> Float[Array, "B V"]:
    """Divides positive and multiplies negative logits of seen tokens by `penalty` (Keskar et al., arXiv 1909.05858)."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def choose(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], *, sampling: Sampling
) -> Int[Array, " B"]:
    """The next token of every row, int32."""
    if sampling.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, penalty=sampling.repetition_penalty)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
