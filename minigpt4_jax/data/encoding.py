"""An example's words as the token ids of one training sample.

For: which prompt an example is asked with, several turns after one picture, and the limits on lengths. Not for: where
examples come from (`sources.py`), the order in which they come (`pipeline.py`), padding (`batches.py`).

Differs from the original: one prompt is drawn per sample instead of one per batch, and every turn's answer counts in
the loss under the same template that chat uses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import numpy as np

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import ExampleTokens, join_example, limit_answer, limit_prompt
from minigpt4_jax.data.captions import as_it_is
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.prompts import (
    Piece,
    Template,
    encode_answer,
    encode_pieces,
    encode_prompt,
    training_pieces,
)
from minigpt4_jax.data.sources import Example, Source, raise_problems
from minigpt4_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT_FAULT = "text does not fit"
"""The reason for which an example's words are refused."""


def follow_up_pieces(
    template: Template, question: str, *, end_symbol: tuple[Piece, ...]
) -> list[Piece]:
    """What stands between an answer (with its end symbol) and the next one, as the template writes it in chat."""
    after = template.assistant_suffix
    if after[: len(end_symbol)] == end_symbol:
        after = after[len(end_symbol) :]
    return [
        *after,
        *template.user_prefix,
        question,
        *template.user_suffix,
        *template.assistant_prefix,
    ]


class Encoder:
    """Turns examples into `ExampleTokens`; one for a whole run.

    Args:
      prompts: questions, one of which is asked where an example brings none; None shows the bare picture.
      max_text_len: longest answer in tokens, end symbol included.
      max_positions: longest whole sequence in tokens, if the model has a limit.
      max_context_len: longest first prompt, see `batches.limit_prompt`; None for no limit of its own.
      end_symbol, ignored_targets, truncate: see `batches.make_example_tokens`.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        *,
        prompts: Sequence[str | None],
        num_image_tokens: int,
        max_text_len: int,
        max_positions: int | None = None,
        max_context_len: int | None = None,
        end_symbol: tuple[Piece, ...] | None = None,
        ignored_targets: Collection[int] = (),
        truncate: bool = False,
    ) -> None:
        if not prompts:
            raise UserError("There is no prompt to ask with; expected at least one (data.prompts).")
        self._template, self._tokenizer = template, tokenizer
        self._num_image_tokens = num_image_tokens
        self.max_text_len, self._max_positions = max_text_len, max_positions
        self._max_context_len = max_context_len
        self._cut_prompts: set[str | None] = set()
        self._end_symbol = template.end_symbol if end_symbol is None else end_symbol
        self._ignored_targets, self._truncate = ignored_targets, truncate
        self._prompts = [self._first_prompt(prompt) for prompt in prompts]
        self._longest = int(np.argmax([len(ids) for ids in self._prompts]))

    @property
    def cut_prompts(self) -> int:
        """How many different prompts `truncate` has cut so far."""
        return len(self._cut_prompts)

    @property
    def num_prompts(self) -> int:
        """Among which `choice` of `encode` chooses."""
        return len(self._prompts)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sample that one of the prompts and one answer can make."""
        return len(self._prompts[self._longest]) + self.max_text_len

    def encode(
        self, example: Example, choice: int, *, process: Callable[[str], str] = as_it_is
    ) -> ExampleTokens:
        """One sample, unpadded. `choice` is the prompt for an example without one; `process` is applied to answers.

        Raises `SampleFault` (`TEXT_FAULT`) that names the example when a length is over its limit or an answer empty.
        """
        parts = []
        for place, exchange in enumerate(example.exchanges):
            if place:
                pieces = follow_up_pieces(
                    self._template, exchange.question or "", end_symbol=self._end_symbol
                )
                prompt = encode_pieces(pieces, self._tokenizer, num_image_tokens=0)
            elif exchange.question is None:
                prompt = self._prompts[choice]
            else:
                prompt = self._own_prompt(exchange.question, example.name)
            answer, cut = self._answer(process(exchange.answer), example.name)
            parts.append(
                join_example(prompt, answer, ignored_targets=self._ignored_targets, cut_tokens=cut)
            )
        joined = ExampleTokens(
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.loss_mask for part in parts]),
            sum(part.cut_tokens for part in parts),
        )
        length = len(joined.token_ids)
        if self._max_positions is not None and length > self._max_positions:
            raise SampleFault(
                TEXT_FAULT,
                f"{example.name} has {length} tokens in all; expected at most {self._max_positions}, the model's "
                "context. Shorten the prompt or the answer.",
            )
        return joined

    def check(
        self,
        source: Source,
        *,
        process: Callable[[str], str] = as_it_is,
        require_fit: Callable[[ExampleTokens, str], None] = lambda tokens, name: None,
    ) -> int:
        """Encodes every example with the longest prompt. Returns how many have a cut answer.

        `require_fit` gets each with its name, and may raise `SampleFault` too. Raises `UserError` that lists every
        example that does not fit.
        """
        problems, cut_answers = [], 0
        for index in range(len(source)):
            try:
                example = source[index]
                tokens = self.encode(example, self._longest, process=process)
                require_fit(tokens, example.name)
                cut_answers += tokens.cut_tokens > 0
            except SampleFault as fault:
                problems.append(str(fault))
        raise_problems(problems, "The data set does not fit the training settings")
        return cut_answers

    def _first_prompt(self, prompt: str | None) -> list[int]:
        ids = encode_prompt(
            self._template,
            training_pieces(self._template, prompt),
            tokenizer=self._tokenizer,
            num_image_tokens=self._num_image_tokens,
        )
        limit = len(ids) if self._max_context_len is None else self._max_context_len
        ids, cut = limit_prompt(
            ids,
            num_bos=int(self._template.bos is not None),
            max_context_len=limit,
            truncate=self._truncate,
            name=f"prompt {prompt!r}",
        )
        if cut:
            # Said here too: a stream that is read as it comes has no count to show before it ends.
            if not self._cut_prompts:
                logger.warning(
                    "Prompts are cut to data.max_context_len (%d) tokens: %r.", limit, prompt
                )
            self._cut_prompts.add(prompt)
        return ids

    def _own_prompt(self, question: str, name: str) -> list[int]:
        try:
            return self._first_prompt(question)
        except UserError as error:
            raise SampleFault(TEXT_FAULT, f"{name}: {error}") from error

    def _answer(self, text: str, name: str) -> tuple[list[int], int]:
        if not text.strip():
            raise SampleFault(TEXT_FAULT, f"The answer of {name} is empty; expected some text.")
        ids = encode_answer(
            self._template, text, tokenizer=self._tokenizer, end_symbol=self._end_symbol
        )
        try:
            return limit_answer(
                ids, max_text_len=self.max_text_len, truncate=self._truncate, name=name
            )
        except UserError as error:
            raise SampleFault(TEXT_FAULT, str(error)) from error
