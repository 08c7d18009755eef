"""Samples as token ids, and samples put together to a padded batch.

For: the sequence layout of training, `[bos][prompt with image placeholders][answer and end symbol]`, which tokens
count in the loss, and padding. Not for: text (`prompts.py`), reading files (`sources.py`), the loss (`training/`).

Differs from the original: it builds the layout from embeddings inside the model's forward and pads answers before
they are appended; here it is ids, ready before the model is called, padded once, on the right. An answer that is too
long is an error here, and so is a prompt; the original cuts both in silence, end symbol and picture and all
(`truncate=True` does that and says how much).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from minigpt4_jax.config import IMAGE_TOKEN_ID, UserError
from minigpt4_jax.data.prompts import (
    Piece,
    Template,
    encode_answer,
    encode_prompt,
    training_pieces,
)
from minigpt4_jax.data.tokenizer import Tokenizer

Shape = tuple[int, int]
"""Of a batch or a sample: its length in tokens, and its places for targets."""


class Batch(TypedDict):
    """A padded batch. S is the sequence length, A the number of places for targets (see `padding.py`).

    Position `target_positions[b, a]` of sample b holds the logits that predict `target_ids[b, a]`; entries where
    `target_mask` is False are padding and count nothing.
    """

    token_ids: Int32[np.ndarray, "B S"]
    """`IMAGE_TOKEN_ID` where image embeddings go; 0 after the end."""
    attention_mask: Bool[np.ndarray, "B S"]
    target_positions: Int32[np.ndarray, "B A"]
    target_ids: Int32[np.ndarray, "B A"]
    target_mask: Bool[np.ndarray, "B A"]
    image_index: Int32[np.ndarray, " B"]
    """Number of the sample's picture among the pictures of all sources: its row in the feature cache."""
    source: NotRequired[Int32[np.ndarray, " B"]]
    """Number of the sample's source, in a batch of a stream (`pipeline.py`)."""
    sample_index: NotRequired[Int64[np.ndarray, " B"]]
    """Number of the sample in its source, likewise. Of a corrupt sample, that of the one in its place."""
    pixels: NotRequired[Float32[np.ndarray, "B H W 3"]]
    """The normalised pictures, where the run trains from pixels."""


@dataclass(frozen=True)
class ExampleTokens:
    """One sample, unpadded."""

    token_ids: Int32[np.ndarray, " S"]
    loss_mask: Bool[np.ndarray, " S"]
    """True at the tokens that the model must predict: the answer and its end symbol."""
    cut_tokens: int = 0
    """Answer tokens lost to truncation."""


def wrap_images(segments: Sequence[Sequence[int]], num_image_tokens: int) -> list[int]:
    """Ids of a prompt given as the token ids of the text around its pictures: n + 1 segments hold n pictures."""
    ids: list[int] = []
    for index, segment in enumerate(segments):
        if index:
            ids += [IMAGE_TOKEN_ID] * num_image_tokens
        ids += segment
    return ids


def join_example(
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    ignored_targets: Collection[int] = (),
    cut_tokens: int = 0,
) -> ExampleTokens:
    """One sample from ids: the answer (end symbol included) right after the prompt (bos and placeholders included).

    `ignored_targets` are ids that never count in the loss although they are attended to: the original treats its
    padding token that way even inside an answer (LLaMA's `$$`). Raises `ValueError` when prompt or answer is empty.
    """
    if not prompt_ids or not answer_ids:
        raise ValueError(
            f"A sample has {len(prompt_ids)} prompt and {len(answer_ids)} answer tokens; expected at least one of "
            "each: the first answer token is predicted from the token before it."
        )
    token_ids = np.asarray([*prompt_ids, *answer_ids], np.int32)
    loss_mask = np.zeros(token_ids.shape, bool)
    loss_mask[len(prompt_ids) :] = ~np.isin(answer_ids, list(ignored_targets))
    return ExampleTokens(token_ids, loss_mask, cut_tokens)


def limit_answer(
    answer_ids: list[int], *, max_text_len: int, truncate: bool, name: str
) -> tuple[list[int], int]:
    """Holds an answer to `max_text_len` tokens, end symbol included. Returns its ids and how many were cut.

    Raises `UserError` naming the sample (`name`) unless `truncate`.
    """
    cut = max(0, len(answer_ids) - max_text_len)
    if cut and not truncate:
        raise UserError(
            f"The answer of {name} has {len(answer_ids)} tokens with its end symbol; expected at most {max_text_len} "
            "(data.max_text_len). Raise the limit or shorten the answer."
        )
    return answer_ids[:max_text_len], cut


def limit_prompt(
    prompt_ids: list[int], *, num_bos: int, max_context_len: int, truncate: bool, name: str
) -> tuple[list[int], int]:
    """Holds a prompt to `max_context_len` tokens, its pictures included. Returns its ids and how many were cut.

    As in the original (`prompt_wrap`), the `num_bos` ids in front are not counted and what is too long goes on the
    right: the end of the question first, then the picture. Raises `UserError` naming the prompt unless `truncate`.
    """
    cut = max(0, len(prompt_ids) - num_bos - max_context_len)
    if cut and not truncate:
        raise UserError(
            f"The {name} has {len(prompt_ids) - num_bos} tokens with its picture; expected at most {max_context_len} "
            "(data.max_context_len). Raise the limit or shorten the prompt."
        )
    return prompt_ids[: num_bos + max_context_len], cut


def make_example_tokens(
    template: Template,
    tokenizer: Tokenizer,
    *,
    prompt: str | None,
    answer: str,
    num_image_tokens: int,
    max_text_len: int,
    name: str = "the sample",
    end_symbol: tuple[Piece, ...] | None = None,
    ignored_targets: Collection[int] = (),
    truncate: bool = False,
) -> ExampleTokens:
    """One training sample from text, with one picture.

    Args:
      prompt: the question; None for the original's first stage, which has only the picture.
      max_text_len: longest answer in tokens, end symbol included; a longer one raises `UserError` with `name`.
      end_symbol: another end symbol than the template's.
      ignored_targets: see `join_example`.
      truncate: cut long answers, as the original does; `cut_tokens` of the result says how much.
    """
    prompt_ids = encode_prompt(
        template,
        training_pieces(template, prompt),
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
    )
    answer_ids, cut = limit_answer(
        encode_answer(template, answer, tokenizer=tokenizer, end_symbol=end_symbol),
        max_text_len=max_text_len,
        truncate=truncate,
        name=name,
    )
    return join_example(prompt_ids, answer_ids, ignored_targets=ignored_targets, cut_tokens=cut)


def size_of(example: ExampleTokens) -> Shape:
    """Tokens of a sample, and how many of them must be predicted."""
    return len(example.token_ids), int(example.loss_mask.sum())


def padded_shape(examples: Sequence[ExampleTokens], *, length_multiple: int) -> Shape:
    """The smallest (length, targets) that holds these samples, both rounded up to a multiple; at least one of each."""
    lengths, targets = zip(*map(size_of, examples), strict=True)
    return round_up(max(lengths), length_multiple), round_up(max(1, *targets), length_multiple)


def collate(
    examples: Sequence[ExampleTokens],
    image_index: Sequence[int],
    *,
    length_multiple: int,
) -> Batch:
    """`pad_batch` to the smallest shape that holds the samples, rounded up to a multiple of `length_multiple`."""
    _require_rows(examples, image_index)
    shape = padded_shape(examples, length_multiple=length_multiple)
    return pad_batch(examples, image_index, shape=shape)


def pad_batch(
    examples: Sequence[ExampleTokens], image_index: Sequence[int], *, shape: Shape
) -> Batch:
    """Pads samples on the right to one batch of `shape`, (length, targets).

    Every sample keeps all its tokens. Raises `ValueError` when the counts differ, there is no sample, or one does not
    fit.
    """
    _require_rows(examples, image_index)
    size, (length, targets) = len(examples), shape
    batch = Batch(
        token_ids=np.zeros((size, length), np.int32),
        attention_mask=np.zeros((size, length), bool),
        target_positions=np.zeros((size, targets), np.int32),
        target_ids=np.zeros((size, targets), np.int32),
        target_mask=np.zeros((size, targets), bool),
        image_index=np.asarray(image_index, np.int32),
    )
    for row, example in enumerate(examples):
        end = len(example.token_ids)
        places = np.flatnonzero(example.loss_mask)
        if end > length or len(places) > targets:
            raise ValueError(
                f"A sample has {end} tokens and {len(places)} targets; expected at most {length} and {targets}."
            )
        batch["token_ids"][row, :end] = example.token_ids
        batch["attention_mask"][row, :end] = True
        # Logits at position p predict the token at p + 1. A sample's first token is never a target.
        batch["target_positions"][row, : len(places)] = places - 1
        batch["target_ids"][row, : len(places)] = example.token_ids[places]
        batch["target_mask"][row, : len(places)] = True
    return batch


def _require_rows(examples: Sequence[ExampleTokens], image_index: Sequence[int]) -> None:
    if not examples or len(examples) != len(image_index):
        raise ValueError(
            f"{len(examples)} samples with {len(image_index)} picture rows; expected as many of each, at least one."
        )


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple
