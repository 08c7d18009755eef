"""Candidate answers ranked by their losses (`multi_select`): losses, and the order with and without `num_cand`.

Prompts and answers are written with this project's template from the recorded words; the limits and the end symbol are
those of the folder's other records, as the set names none for this one. Tolerance: the losses' in the sets' README.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.data.batches import limit_answer, limit_prompt
from minigpt4_jax.data.prompts import (
    MINIGPT_V2,
    Picture,
    encode_answer,
    encode_prompt,
    end_symbol_pieces,
    pieces_text,
    training_pieces,
)
from minigpt4_jax.generation.score import (
    AnswerScore,
    Candidates,
    multi_select,
    rank_by_mean,
    score_answers,
    score_rows,
)
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import apply_method, make_model

LOSS: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}


class SelectCase:
    """Recorded questions with their candidates, as ids, and how likely each is."""

    def __init__(self, golden: Any, folder: str, name: str) -> None:
        records = golden.report(f"{folder}/cases.json")
        self.record, self.held = records[name], golden.arrays(f"{folder}/{name}.npz")
        # Not what a case was given on purpose (a short context): the largest are the model's.
        full = [each for each in records.values() if "max_txt_len" in each]
        self.limits = {k: max(x[k] for x in full) for k in ("max_txt_len", "max_context_len")}
        (self.end,) = {each["end_sym"] for each in full}
        (self.written,) = {each["prompt_template"] for each in full}
        self.tokenizer = golden.tokenizer("llama_mha")
        pictures = golden.pictures(f"{folder}/{name}.npz")
        self.config, params = golden.minigpt4(pictures.shape[1], variant=folder)
        params = convert_layout(params, DISK, DECODE, llama=self.config.llama)
        model = make_model(self.config, layout=DECODE, dtype=jnp.float32)
        self.pictures = np.asarray(apply_method(model, params, "encode_images", pictures))
        self.run = functools.partial(jax.jit(functools.partial(score_rows, model=model)), params)

    def questions(self) -> list[Candidates]:
        texts, candidates = self.record["instruction_input"], self.record["candidates_per_sample"]
        return [
            Candidates(
                prompt=tuple(self.prompt(text)),
                image_embeds=[picture],
                answers=tuple(tuple(self.answer(words)) for words in answers),
            )
            for text, picture, answers in zip(texts, self.pictures, candidates, strict=True)
        ]

    def prompt(self, text: str) -> list[int]:
        shown = pieces_text([MINIGPT_V2.image_before, Picture(), MINIGPT_V2.image_after])
        pieces = training_pieces(MINIGPT_V2, text.removeprefix(shown + MINIGPT_V2.image_join))
        assert pieces_text(pieces) == self.written.format(text)
        ids = encode_prompt(
            MINIGPT_V2,
            pieces,
            tokenizer=self.tokenizer,
            num_image_tokens=self.config.num_image_tokens,
        )
        return limit_prompt(
            ids,
            num_bos=1,
            max_context_len=self.limits["max_context_len"],
            truncate=True,
            name=text,
        )[0]

    def answer(self, words: str) -> list[int]:
        end = end_symbol_pieces(self.end, self.tokenizer)
        ids = encode_answer(MINIGPT_V2, words, tokenizer=self.tokenizer, end_symbol=end)
        assert self.tokenizer.pad_id not in ids, "the original leaves its pad token out of a loss"
        return limit_answer(
            ids, max_text_len=self.limits["max_txt_len"], truncate=True, name=words
        )[0]


@pytest.fixture(scope="module")
def case(golden: Any, select_case: tuple[str, str]) -> SelectCase:
    return SelectCase(golden, *select_case)


@pytest.fixture(scope="module")
def scores(case: SelectCase) -> list[list[AnswerScore]]:
    questions = case.questions()
    longest = max(len(each.prompt) + len(ids) for each in questions for ids in each.answers)
    return score_answers(
        case.run,
        questions,
        bucket=lambda length: length + -length % 8,
        context=longest,
        width=case.config.llama.width,
    )


def test_golden_multi_select_losses_and_order(
    case: SelectCase, scores: list[list[AnswerScore]]
) -> None:
    losses, ranks = multi_select(scores)
    np.testing.assert_allclose(losses, case.held["losses"], **LOSS)
    np.testing.assert_array_equal(ranks, case.held["ranks"])


def test_golden_multi_select_with_fewer_candidates(
    case: SelectCase, scores: list[list[AnswerScore]]
) -> None:
    _, ranks = multi_select(scores, num_cand=case.record["num_cand"])
    (held,) = (x for name, x in case.held.items() if name.startswith("ranks_num_cand"))
    np.testing.assert_array_equal(ranks, held)


def test_golden_order_by_mean_is_that_of_the_recorded_losses_per_token(
    case: SelectCase, scores: list[list[AnswerScore]]
) -> None:
    """The same losses, divided by the tokens of each answer instead of by the places of its batch."""
    longest = max(len(case.prompt(text)) for text in case.record["instruction_input"])
    counts = np.asarray([[score.num_tokens for score in row] for row in scores])
    means = case.held["losses"] * (longest - 1 + counts.max(axis=0)[None]) / counts
    for row, mean in zip(scores, means, strict=True):
        assert rank_by_mean(row) == np.argsort(mean, kind="stable").tolist()
