"""MiniGPT4.score: what the engine is asked to rank, and by what the candidates are put in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from minigpt4_jax import GenerationConfig, MiniGPT4, UserError
from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.score import AnswerScore, Candidates

CANDIDATES = ["A cat.", "A very long story about cats.", "No"]


class Judge:
    """Gives each token of an answer, its end symbol included, one log-probability."""

    def __init__(self, model: MiniGPT4, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Candidates] = []
        self.per_token = [-1.0, -0.5, -2.0]
        monkeypatch.setattr(model.engine, "score", self.score)

    def score(self, questions: Sequence[Candidates]) -> list[list[AnswerScore]]:
        self.asked += questions
        return [
            [
                AnswerScore(each * len(answer), len(answer), len(question.prompt))
                for each, answer in zip(self.per_token, question.answers, strict=True)
            ]
            for question in questions
        ]


@pytest.fixture
def judge(model: MiniGPT4, monkeypatch: pytest.MonkeyPatch) -> Judge:
    return Judge(model, monkeypatch)


def test_candidates_are_asked_as_answers_of_a_chat_with_the_end_that_was_trained(
    model: MiniGPT4, judge: Judge, pictures: Any, tokenizer: Tokenizer
) -> None:
    model.score(pictures[:2], "What?", CANDIDATES)
    (question,) = judge.asked
    end = tokenizer.special("<|im_end|>")
    assert question.answers == tuple((*tokenizer.encode(text), end) for text in CANDIDATES)
    slots = model.preset.model.num_image_tokens
    assert question.prompt.count(IMAGE_TOKEN_ID) == 2 * slots
    text = tokenizer.decode([t for t in question.prompt if t >= 0], skip_special=False)
    assert text.endswith("What?<|im_end|>\n<|im_start|>assistant\n")
    assert [len(embeds) for embeds in question.image_embeds] == [slots, slots]


@pytest.mark.parametrize(
    ("normalise", "order"),
    [("tokens", [1, 0, 2]), ("none", [2, 0, 1]), ("original", [2, 0, 1])],
)
def test_a_normalisation_puts_candidates_in_its_order(
    normalise: str, order: list[int], model: MiniGPT4, judge: Judge
) -> None:
    found = model.score(None, "What?", CANDIDATES, normalise=normalise)
    assert [one.index for one in found] == order
    assert [one.candidate for one in found] == [CANDIDATES[place] for place in order]
    (question,) = judge.asked
    by_index = {one.index: one for one in found}
    for place, each in enumerate(judge.per_token):
        one, length = by_index[place], len(question.answers[place])
        assert (one.num_tokens, one.logprob) == (length, each * length)
        over = {"tokens": length, "none": 1, "original": len(question.prompt) - 1 + length}
        assert one.score == pytest.approx(each * length / over[normalise], rel=1e-6)


def test_the_answer_that_a_model_gives_itself_is_likelier_than_that_to_another_picture(
    model: MiniGPT4, pictures: Any
) -> None:
    greedy = GenerationConfig(max_new_tokens=12)
    own, other = model.generate(pictures[:2], ["What?"] * 2, generation=greedy)
    assert own != other
    first = model.score(pictures[0], "What?", [other, own])
    assert [one.candidate for one in first] == [own, other]
    second = model.score(pictures[1], "What?", [other, own])
    assert [one.candidate for one in second] == [other, own]
    assert all(one.logprob < 0 for one in first + second)


def test_of_equal_candidates_the_earlier_comes_first(model: MiniGPT4, judge: Judge) -> None:
    judge.per_token = [-1.0, -1.0, -1.0]
    assert [one.index for one in model.score(None, "What?", CANDIDATES)] == [0, 1, 2]


def test_what_cannot_be_ranked_is_refused(model: MiniGPT4, judge: Judge) -> None:
    for candidates in ([], "A cat.", ["A cat.", " "]):
        with pytest.raises(UserError, match=r"candidates is .*; expected a list of texts"):
            model.score(None, "What?", candidates)
    with pytest.raises(UserError, match="normalise is 'words'; expected one of tokens, none, orig"):
        model.score(None, "What?", ["a", "b", "c"], normalise="words")
    with pytest.raises(UserError, match="The conversation is full"):
        model.score(None, "What?", ["long " * 100])
