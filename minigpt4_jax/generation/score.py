"""Ranking answers by likelihood: how probable the model finds each candidate after a prompt, and two orders of them.

`score_rows` is the pure function that the engine compiles: whole rows (prompt and answer) without a cache, and the head
at the places of answers only, `BLOCK` of them at a time; the logits of a whole batch, `[B, S, V]`, never exist.
`score_answers` lays the rows out in padded lengths and batches that come back, so that programs do too.

`multi_select` is the order of the original (`minigpt_base.py`), which ranks by the sum over the answer divided by the
padded length of the batch, so that a long answer costs more than a short one, and one prompt's length moves the losses
of the others; `rank_by_mean` is the one to use: by the mean over the answer's own tokens. Differs from the original in
how it gets there: all candidates of a prompt go through the model together, where the original runs one candidate of
all prompts at a time; the losses are the same.

Not for: drawing answers, text (an answer is its ids, with its end symbol if that is to count), compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minigpt4_jax.config import IMAGE_TOKEN_ID, UserError
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, apply_method

BLOCK = 16
"""Places of an answer that the head reads at once, of all rows: 16 x 8 rows x 32,000 logits are 16 MB in float32."""
MAX_ROWS = 8
"""Rows of one call. The attention of 8 rows of 512 tokens and 32 heads takes 0.3 GB of scores in float32."""
LAST = 9999.0
"""The loss that the original gives to candidates that do not count."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """A prompt and the answers to choose from."""

    prompt: tuple[int, ...]
    """Ids; `IMAGE_TOKEN_ID` takes the next row of `image_embeds`."""
    image_embeds: Sequence[Float[Array, "_ D"] | Float[np.ndarray, "_ D"]]
    """Embeddings of every picture of the prompt, in its order."""
    answers: tuple[tuple[int, ...], ...]
    """Ids of each answer, at least one. An end token counts if it is there."""


class AnswerScore(NamedTuple):
    """How likely one answer is."""

    logprob: float
    """Natural logarithm of the probability of the whole answer after its prompt: the sum over its tokens."""
    num_tokens: int
    """Of the answer."""
    prompt_tokens: int
    """Of the prompt, image tokens and bos included."""


Run = Callable[
    [
        Int[np.ndarray, "B S"],
        Float[np.ndarray, "B R D"],
        Int[np.ndarray, " B"],
        Int[np.ndarray, " B"],
    ],
    Float[Array, " B"],
]
"""`score_rows`, compiled, over its parameters."""


def score_rows(
    params: Params,
    token_ids: Int[Array, "B S"],
    image_embeds: Float[Array, "B R D"],
    prompt_lengths: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    model: MiniGPT4,
) -> Float[Array, " B"]:
    """The log-probability of each row's answer after its prompt, float32.

    Args:
        params: of the language model, in an unstacked layout.
        token_ids: prompt and answer, right-padded; `IMAGE_TOKEN_ID` slots take the rows of `image_embeds` in order.
        image_embeds: rows beyond a prompt's placeholders are ignored.
        prompt_lengths: tokens of each prompt, at least 1.
        lengths: tokens of prompt and answer; where both are equal there is no answer, and the result is 0.
    """
    embeds = apply_method(model, params, "embed_prompt", token_ids, image_embeds)
    batch, length = token_ids.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], token_ids.shape)
    hidden, _, _ = apply_method(
        model,
        params,
        "decode",
        embeds,
        positions=positions,
        mask=make_cache_mask(positions, length),  # what stands behind an answer is never seen by it
        caches=None,
    )

    def add_block(block: Int[Array, ""], total: Float[Array, " B"]) -> Float[Array, " B"]:
        places = prompt_lengths[:, None] + block * BLOCK + jnp.arange(BLOCK)[None]
        counts = places < lengths[:, None]
        places = jnp.minimum(places, length - 1)
        before = jnp.take_along_axis(hidden, places[:, :, None] - 1, axis=1)
        log_probs = jax.nn.log_softmax(apply_method(model, params, "head", before))
        targets = jnp.maximum(jnp.take_along_axis(token_ids, places, axis=1), 0)
        found = jnp.take_along_axis(log_probs, targets[:, :, None], axis=2)[:, :, 0]
        return total + jnp.sum(found, axis=1, where=counts)

    # As many blocks as the longest answer has: a number, not a shape, so that no length of an answer compiles anything.
    blocks = -(-jnp.max(lengths - prompt_lengths) // BLOCK)
    total: Float[Array, " B"] = jax.lax.fori_loop(
        0, blocks, add_block, jnp.zeros(batch, jnp.float32)
    )
    return total


def score_answers(
    run: Run,
    questions: Sequence[Candidates],
    *,
    bucket: Callable[[int], int],
    context: int,
    width: int,
) -> list[list[AnswerScore]]:
    """How likely each answer of each question is, in their order.

    Rows of one padded length go through `run` together, up to `MAX_ROWS`, in batches of 1, 2, 4 or 8: a padded length
    has four programs at most, whatever is asked.

    Args:
        run: see `Run`.
        bucket: the padded length for a row of so many tokens.
        context: tokens that prompt and answer may have together.
        width: of the language model.

    Raises:
        UserError: an empty prompt, no answer or an empty one, a placeholder in an answer, more or fewer image
            embeddings than placeholders, a row longer than `context`, or a result that is no finite number.
    """
    rows: list[_Row] = []
    for number, question in enumerate(questions):
        rows.extend(_lay_out(question, number, context=context, width=width))
    found: dict[tuple[int, int], AnswerScore] = {}
    for length in sorted({bucket(len(row.token_ids)) for row in rows}):
        together = [row for row in rows if bucket(len(row.token_ids)) == length]
        for start in range(0, len(together), MAX_ROWS):
            part = together[start : start + MAX_ROWS]
            logprobs = np.asarray(run(*_pad(part, length=length, width=width)))
            for row, logprob in zip(part, logprobs[: len(part)].tolist(), strict=True):
                if not np.isfinite(logprob):
                    raise UserError(
                        f"The log-likelihood of {row.name} is {logprob}; expected a finite number. Check the model's "
                        "weights and the picture for NaN, and the prompt and the answer for ids beyond the vocabulary."
                    )
                answer_tokens = len(row.token_ids) - row.prompt_length
                found[row.place] = AnswerScore(logprob, answer_tokens, row.prompt_length)
    return [
        [found[number, place] for place in range(len(question.answers))]
        for number, question in enumerate(questions)
    ]


def multi_select(
    scores: Sequence[Sequence[AnswerScore]], *, num_cand: Sequence[int] | None = None
) -> tuple[Float[np.ndarray, "B C"], Int[np.ndarray, "B C"]]:
    """The original's losses and its order, best first, of as many candidates for every question of a batch.

    A loss is the negative log-likelihood of the answer over the places of its batch, which in the original is the same
    candidate of all questions: the longest prompt plus the longest answer, less one. It depends on the neighbours.

    Args:
        num_cand: candidates of each question that count; those behind them get the loss 9999 and come last.

    Raises:
        UserError: the questions have different numbers of candidates, or `num_cand` is not one number for each.
    """
    counts = sorted({len(row) for row in scores})
    if len(counts) != 1:
        raise UserError(
            f"The questions have {counts} candidates; expected as many for each. Fill up, and give num_cand."
        )
    places = max(score.prompt_tokens for row in scores for score in row) - 1
    losses = np.asarray(
        [
            [-score.logprob / (places + max(other.num_tokens for other in column)) for score in column]
            for column in zip(*scores, strict=True)
        ],
        np.float32,
    ).T  # fmt: skip
    if num_cand is not None:
        if len(num_cand) != len(scores) or not all(0 < count <= counts[0] for count in num_cand):
            raise UserError(
                f"num_cand is {list(num_cand)}; expected {len(scores)} numbers from 1 to {counts[0]}."
            )
        losses[np.arange(counts[0])[None] >= np.asarray(num_cand)[:, None]] = LAST
    return losses, np.argsort(losses, axis=1, kind="stable")


def rank_by_mean(scores: Sequence[AnswerScore]) -> list[int]:
    """The answers to one question, by their mean log-probability per token, best first; of equal ones the earlier.

    The normalised likelihood of Brown et al. (arXiv 2005.14165, section 2.4), without dividing by an unconditional one.
    """
    return sorted(
        range(len(scores)), key=lambda place: -scores[place].logprob / scores[place].num_tokens
    )


class _Row(NamedTuple):
    """One answer behind its prompt."""

    place: tuple[int, int]
    """Numbers of the question and of the answer."""
    token_ids: tuple[int, ...]
    prompt_length: int
    image_embeds: Float[np.ndarray, "R D"]

    @property
    def name(self) -> str:
        return f"answer {self.place[1]} to question {self.place[0]}"


def _lay_out(question: Candidates, number: int, *, context: int, width: int) -> Iterator[_Row]:
    embeds = [np.asarray(rows, np.float32) for rows in question.image_embeds]
    joined = np.concatenate([np.zeros((0, width), np.float32), *embeds])
    slots = sum(token == IMAGE_TOKEN_ID for token in question.prompt)
    if slots != len(joined):
        raise UserError(
            f"Question {number} has {slots} image slots and {len(joined)} image embeddings; expected as many."
        )
    if not question.prompt or not question.answers:
        raise UserError(
            f"Question {number} has {len(question.prompt)} prompt tokens and {len(question.answers)} answers; "
            "expected at least one of each."
        )
    for place, answer in enumerate(question.answers):
        row = _Row((number, place), (*question.prompt, *answer), len(question.prompt), joined)
        if not answer or min(answer) < 0:
            raise UserError(
                f"{row.name.capitalize()} is {list(answer)}; expected ids of tokens, at least one."
            )
        if len(row.token_ids) > context:
            raise UserError(
                f"{row.name.capitalize()} has {len(answer)} tokens and its prompt {len(question.prompt)}; expected at "
                f"most {context} together, the context. Shorten the prompt or the answer."
            )
        yield row


def _pad(
    rows: Sequence[_Row], *, length: int, width: int
) -> tuple[
    Int[np.ndarray, "B {length}"],
    Float[np.ndarray, "B {length} D"],
    Int[np.ndarray, " B"],
    Int[np.ndarray, " B"],
]:
    """The arguments of `Run`. Rows that fill up the batch are one token without an answer."""
    batch = 1 << (len(rows) - 1).bit_length()
    token_ids = np.zeros((batch, length), np.int32)
    image_embeds = np.zeros((batch, length, width), np.float32)
    prompt_lengths, lengths = np.ones(batch, np.int32), np.ones(batch, np.int32)
    for number, row in enumerate(rows):
        token_ids[number, : len(row.token_ids)] = row.token_ids
        image_embeds[number, : len(row.image_embeds)] = row.image_embeds
        prompt_lengths[number], lengths[number] = row.prompt_length, len(row.token_ids)
    return token_ids, image_embeds, prompt_lengths, lengths
