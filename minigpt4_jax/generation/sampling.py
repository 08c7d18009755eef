"""From logits to the next token: greedy or drawn, with the repetition penalty. Pure functions; runs inside the step.

The order is that of transformers 4.30, which the original generates with: repetition penalty, temperature, top-k,
top-p, and then the draw. Every number is traced, so that changing one compiles nothing; whether tokens are drawn at all
is the shape of the tree (`Sampling.draw` is None or not), so that a greedy step never sorts the vocabulary.

Differs from the original in its chance only: a draw depends on its row's seed and on the place of the token, never on
the batch around it; the original draws from one global generator. Tokens that tie with the last one kept by top-p are
kept, where the original keeps some of them by the accident of its sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

FloatScalar = float | np.float32 | Float[Array, ""]
IntScalar = int | np.int32 | Int[Array, ""]


@flax.struct.dataclass
class Draw:
    """How a token is drawn."""

    temperature: FloatScalar
    """Above 0: divides the logits. Below 1 likely tokens become likelier still."""
    top_k: IntScalar
    """Only so many of the likeliest tokens are drawn from; 0 is off. Ties with the last one count."""
    top_p: FloatScalar
    """Only the likeliest tokens that together reach this probability are drawn from; 1 is off."""
    seeds: UInt32[Array, " B"] | UInt32[np.ndarray, " B"]
    """One per row. The same seed and prompt give the same answer, whatever the other rows are."""


@flax.struct.dataclass
class Sampling:
    """How a token is chosen. Build one with `make_sampling`, which settles the dtypes."""

    repetition_penalty: FloatScalar
    """1 leaves the logits alone; above 1 tokens that were already written become less likely."""
    draw: Draw | None
    """None is greedy: always the likeliest token."""


GREEDY = Sampling(repetition_penalty=np.float32(1.0), draw=None)


def make_sampling(
    *,
    repetition_penalty: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
) -> Sampling:
    """The tree for plain numbers, which are those of `presets.GenerationConfig` and are checked there.

    Args:
        temperature: 0 is greedy; the settings after it then have no meaning.
        seeds: one per row, 0 to 2^32 - 1.
    """
    draw = None
    if temperature > 0:
        draw = Draw(
            temperature=np.float32(temperature),
            top_k=np.int32(top_k),
            top_p=np.float32(top_p),
            seeds=np.asarray(seeds, np.uint32),
        )
    return Sampling(repetition_penalty=np.float32(repetition_penalty), draw=draw)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], *, penalty: FloatScalar
) -> Float[Array, "B V"]:
    """Divides positive and multiplies negative logits of seen tokens by `penalty` (Keskar et al., arXiv 1909.05858)."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def keep_likely(
    logits: Float[Array, "B V"], *, top_k: IntScalar, top_p: FloatScalar
) -> Float[Array, "B V"]:
    """Logits with -inf for every token outside top-k, and then outside top-p of what is left.

    Top-p is the nucleus of Holtzman et al. (arXiv 1904.09751), with the token that crosses `top_p` inside.
    """
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kth = jax.lax.dynamic_slice_in_dim(ordered, vocab - count, 1, axis=-1)
    # Summed from the least likely token on, as the original does: float32 keeps the small ones apart there.
    reached = jnp.cumsum(jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf)), axis=-1)
    kept = (reached > 1 - top_p) | (top_p >= 1)
    kept = kept.at[:, -1].set(True)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(kth, least), logits, -jnp.inf)


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    positions: Int[Array, " B"],
    *,
    sampling: Sampling,
) -> Int[Array, " B"]:
    """The next token of every row, int32.

    Args:
        seen: tokens that the repetition penalty counts as written.
        positions: where the chosen tokens will stand; no two draws of a conversation share one.
    """
    logits = penalize_repetition(logits, seen, penalty=sampling.repetition_penalty)
    draw = sampling.draw
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    likely = keep_likely(logits / draw.temperature, top_k=draw.top_k, top_p=draw.top_p)

    def draw_row(
        seed: UInt32[Array, ""], position: Int[Array, ""], row: Float[Array, " V"]
    ) -> Int[Array, ""]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.categorical(key, row)

    return jax.vmap(draw_row)(jnp.asarray(draw.seeds), positions, likely).astype(jnp.int32)
