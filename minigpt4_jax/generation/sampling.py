"""From logits to the next token: greedy or drawn, every row by settings of its own. Pure functions, inside the step.

The order is that of transformers 4.30, which the original generates with: repetition penalty, temperature, top-k,
top-p, and then the draw; what the original does not have stands where vLLM has it (bias and the penalties of OpenAI's
interface before the temperature, min-p right after it). Every number is traced and belongs to one row, so that changing
one compiles nothing and rows with different settings share a step.

Differs from the original in its chance only: a draw depends on its row's seed and on the place of the token, never on
the batch around it; the original draws from one global generator. Tokens that tie with the last one kept by top-p are
kept, where the original keeps some of them by the accident of its sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

FloatScalar = float | np.float32 | Float[Array, ""]
IntScalar = int | np.int32 | Int[Array, ""]

FEW = 256
"""A cut by top-k or top-p is looked for among so many likeliest tokens; only for one further down all are sorted."""

TOP_LOGPROBS = 20
"""Alternatives whose log-probability is handed out: the most that OpenAI's interface gives."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are chosen. As it stands: always the likeliest one.

    The ranges are checked by `presets.GenerationConfig`, which people fill in.
    """

    temperature: float = 0.0
    """0 is greedy; above 0 divides the logits before the draw."""
    top_k: int = 0
    """Only so many of the likeliest tokens are drawn from; 0 is off. Ties with the last one count."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability are drawn from; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least so likely, as a share of the likeliest one's probability, are drawn from; 0 is off."""
    repetition_penalty: float = 1.0
    """1 leaves the logits alone; above 1 tokens that were already written become less likely."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for every time that the answer has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    seed: int = 0
    """0 to 2^32 - 1. The same seed and prompt give the same answer, whatever is generated beside it."""

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the largest of the model's own logits."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and not self.logit_bias
        )


GREEDY = Sampling()


@flax.struct.dataclass
class SamplingRows:
    """`Sampling` on the device, one entry per row."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    bias: Float[Array, "B V"]
    """Added to the logits."""


def make_rows(settings: list[Sampling], *, vocab_size: int) -> SamplingRows:
    """The device form of the settings of some rows."""
    bias = np.zeros((len(settings), vocab_size), np.float32)
    for row, sampling in zip(bias, settings, strict=True):
        for token, value in sampling.logit_bias:
            row[token] = value

    def column(name: str, dtype: type) -> Array:
        return jnp.asarray([getattr(sampling, name) for sampling in settings], dtype)

    return SamplingRows(
        temperature=column("temperature", jnp.float32),
        top_k=column("top_k", jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        repetition_penalty=column("repetition_penalty", jnp.float32),
        presence_penalty=column("presence_penalty", jnp.float32),
        frequency_penalty=column("frequency_penalty", jnp.float32),
        seed=column("seed", jnp.uint32),
        bias=jnp.asarray(bias),
    )


def penalize_repetition(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    *,
    penalty: FloatScalar | Float[Array, "B 1"],
) -> Float[Array, "B V"]:
    """Divides positive and multiplies negative logits of seen tokens by `penalty` (Keskar et al., arXiv 1909.05858)."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def change_logits(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    counts: Int[Array, "B V"],
    *,
    rows: SamplingRows,
) -> Float[Array, "B V"]:
    """Bias and the three penalties.

    Args:
        seen: tokens that the repetition penalty counts as written.
        counts: how often the answer has each token (OpenAI's presence and frequency penalties).
    """
    logits = penalize_repetition(logits + rows.bias, seen, penalty=rows.repetition_penalty[:, None])
    written = counts.astype(jnp.float32)
    return (
        logits
        - rows.frequency_penalty[:, None] * written
        - rows.presence_penalty[:, None] * (written > 0)
    )


def keep_likely(
    logits: Float[Array, "B V"], *, top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits with -inf for every token outside top-k, and then outside top-p of what is left.

    Top-p is the nucleus of Holtzman et al. (arXiv 1904.09751), with the token that crosses `top_p` inside. A cut among
    the `FEW` likeliest tokens is found there; only if some row's lies further down is the vocabulary sorted, and then
    that row alone goes by it: what a row keeps never depends on its neighbours.
    """
    least, settled = _cut_among_few(logits, top_k=top_k, top_p=top_p)
    least = jax.lax.cond(
        jnp.all(settled),
        lambda: least,
        lambda: jnp.where(settled, least, _cut_among_all(logits, top_k=top_k, top_p=top_p)),
    )
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def _cut_among_few(
    logits: Float[Array, "B V"], *, top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The least logit that is kept, and whether that is certain from the few likeliest tokens alone."""
    few = min(FEW, logits.shape[-1])
    values = jax.lax.top_k(logits, few)[0]
    all_few = few == logits.shape[-1]
    counted = jnp.where(top_k > 0, jnp.minimum(top_k, few), few)
    kth = jnp.take_along_axis(values, counted[:, None] - 1, axis=1)
    within = values >= kth  # ties with the k-th count
    by_k = (top_k > 0) & (top_k <= few)
    # What the probabilities are shares of: the k likeliest tokens, or all.
    some = jax.nn.logsumexp(jnp.where(within, values, -jnp.inf), axis=-1)
    total = jnp.where(by_k, some, jax.nn.logsumexp(logits, axis=-1))
    shares = jnp.where(within, jnp.exp(values - total[:, None]), 0.0)
    before = jnp.cumsum(shares, axis=-1) - shares
    off = (top_p >= 1)[:, None]
    kept = within & ((before < top_p[:, None]) | off)
    kept = kept.at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, values, jnp.inf), axis=-1)
    nothing_cut = (top_k == 0) & (top_p >= 1)
    # A tie that reaches the end of the few may go on behind it; without top-k, the crossing token must be among them.
    ends_inside = values[:, -1] < least
    settled = nothing_cut | (ends_inside & (top_k <= few)) | all_few
    return jnp.where(nothing_cut, -jnp.inf, least), settled


def _cut_among_all(
    logits: Float[Array, "B V"], *, top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The least logit that is kept, from the whole vocabulary in order."""
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kth = jnp.take_along_axis(ordered, vocab - count[:, None], axis=1)
    # Summed from the least likely token on, as the original does: float32 keeps the small ones apart there.
    reached = jnp.cumsum(jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf)), axis=-1)
    kept = (ordered >= kth) & ((reached > 1 - top_p[:, None]) | (top_p >= 1)[:, None])
    kept = kept.at[:, -1].set(True)
    return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)


def choose(
    logits: Float[Array, "B V"], positions: Int[Array, " B"], *, rows: SamplingRows
) -> Int[Array, " B"]:
    """The next token of every row, int32, from logits that bias and penalties have changed.

    Args:
        positions: where the chosen tokens will stand; no two draws of a conversation share one.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = rows.temperature > 0

    def draw_row(
        seed: UInt32[Array, ""], position: Int[Array, ""], row: Float[Array, " V"]
    ) -> Int[Array, ""]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.categorical(key, row).astype(jnp.int32)

    def draw() -> Int[Array, " B"]:
        scaled = logits / jnp.where(draws, rows.temperature, 1.0)[:, None]
        least = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
        # A greedy row among drawn ones looks for no cut.
        likely = keep_likely(
            scaled,
            top_k=jnp.where(draws, rows.top_k, 0),
            top_p=jnp.where(draws, rows.top_p, 1.0),
        )
        drawn = jax.vmap(draw_row)(rows.seed, positions, likely)
        return jnp.where(draws, drawn, greedy)

    chosen: Int[Array, " B"] = jax.lax.cond(jnp.any(draws), draw, lambda: greedy)
    return chosen


@flax.struct.dataclass
class Logprobs:
    """Log-probabilities by the model's own logits, before bias, penalties and temperature (as vLLM's default)."""

    chosen: Float[Array | np.ndarray, " B"]
    top_ids: Int[Array | np.ndarray, "B N"]
    top: Float[Array | np.ndarray, "B N"]
    """Of the `N = TOP_LOGPROBS` likeliest tokens, the likeliest first."""


def measure_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Logprobs:
    """Log-probabilities of the chosen tokens and of the likeliest ones."""
    log_probs = jax.nn.log_softmax(logits)
    top, top_ids = jax.lax.top_k(log_probs, min(TOP_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
    return Logprobs(chosen=chosen, top_ids=top_ids, top=top)
