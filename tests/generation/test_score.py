"""generation/score.py: likelihoods of answers against the whole forward, and the two orders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig, UserError
from minigpt4_jax.generation.score import (
    BLOCK,
    MAX_ROWS,
    AnswerScore,
    Candidates,
    multi_select,
    rank_by_mean,
    score_answers,
    score_rows,
)
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import MiniGPT4, make_model

CONTEXT = 128
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3)
"""Of answers: in one block of the head, at its edge, and in several."""
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-5}


def bucket(length: int) -> int:
    return min(length + -length % 32, CONTEXT)


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> MiniGPT4:
    return make_model(tiny_config, layout=DECODE, dtype=jnp.float32)


@pytest.fixture(scope="module")
def llama(tiny_params: Any, tiny_config: ModelConfig) -> Any:
    return convert_layout({"llama": tiny_params["llama"]}, DISK, DECODE, llama=tiny_config.llama)


Score = Callable[..., list[list[AnswerScore]]]


@pytest.fixture(scope="module")
def score(model: MiniGPT4, llama: Any, tiny_config: ModelConfig) -> Score:
    run = functools.partial(jax.jit(functools.partial(score_rows, model=model)), llama)
    return functools.partial(
        score_answers, run, bucket=bucket, context=CONTEXT, width=tiny_config.llama.width
    )


@pytest.fixture(scope="module")
def questions(prompts: Any, tiny_config: ModelConfig) -> list[Candidates]:
    """The prompts with one picture, two and none, six answers each; every picture is an array of its own."""
    rng = np.random.default_rng(20)
    vocab, per_picture = tiny_config.llama.vocab_size, tiny_config.num_image_tokens
    return [
        Candidates(
            prompt=tuple(ids),
            image_embeds=[
                embeds[start : start + per_picture] for start in range(0, len(embeds), per_picture)
            ],
            answers=tuple(tuple(rng.integers(0, vocab, length).tolist()) for length in LENGTHS),
        )
        for ids, embeds in prompts
    ]


def by_the_whole_forward(full_logits: Any, question: Candidates, answer: tuple[int, ...]) -> float:
    rows = [*question.image_embeds] or [np.zeros((0, 32), np.float32)]
    logits = full_logits([*question.prompt, *answer], np.concatenate(rows))
    wide = np.float64(logits)[len(question.prompt) - 1 : -1]
    log_probs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return float(log_probs[np.arange(len(answer)), list(answer)].sum())


def test_a_score_is_the_log_probability_that_the_whole_forward_gives(
    score: Score, questions: list[Candidates], full_logits: Any
) -> None:
    found = score(questions)
    for question, scores in zip(questions, found, strict=True):
        expected = [by_the_whole_forward(full_logits, question, a) for a in question.answers]
        np.testing.assert_allclose([each.logprob for each in scores], expected, **TOLERANCE)
        assert tuple(each.num_tokens for each in scores) == LENGTHS
        assert {each.prompt_tokens for each in scores} == {len(question.prompt)}


def test_a_score_does_not_depend_on_the_other_candidates(
    score: Score, questions: list[Candidates]
) -> None:
    together = score(questions)
    for question, scores in zip(questions, together, strict=True):
        for answer, expected in zip(question.answers, scores, strict=True):
            alone = Candidates(
                prompt=question.prompt, image_embeds=question.image_embeds, answers=(answer,)
            )
            ((found,),) = score([alone])
            np.testing.assert_allclose(found.logprob, expected.logprob, **TOLERANCE)
            assert found[1:] == expected[1:]


def test_the_pictures_of_a_prompt_are_seen(score: Score, questions: list[Candidates]) -> None:
    question = questions[1]
    swapped = Candidates(
        prompt=question.prompt,
        image_embeds=question.image_embeds[::-1],
        answers=question.answers,
    )
    for one, other in zip(*score([question, swapped]), strict=True):
        assert abs(one.logprob - other.logprob) > 1e-3


def test_programs_come_back_whatever_is_asked(questions: list[Candidates]) -> None:
    """One shape per padded length and number of rows; every number of rows is a power of two up to `MAX_ROWS`."""
    shapes: list[tuple[int, ...]] = []

    def run(token_ids: Any, image_embeds: Any, prompt_lengths: Any, lengths: Any) -> Any:
        assert image_embeds.shape[:2] == token_ids.shape
        assert (lengths <= token_ids.shape[1]).all()
        shapes.append(token_ids.shape)
        return jnp.zeros(len(token_ids))

    width = questions[0].image_embeds[0].shape[1]
    for asked in (questions, questions[::-1], questions * 3, questions[:1]):
        score_answers(run, asked, bucket=bucket, context=CONTEXT, width=width)
    assert {rows for rows, _ in shapes} <= {1, 2, 4, 8} == {1, 2, 4, MAX_ROWS}
    assert {length for _, length in shapes} <= {32, 64, 96, 128}
    count = len(questions) * len(LENGTHS)
    assert sum(rows for rows, _ in shapes[-4:]) <= 2 * count


def test_the_logits_of_a_whole_batch_never_exist(
    model: MiniGPT4, llama: Any, tiny_config: ModelConfig
) -> None:
    rows, length, vocab = 4, 96, tiny_config.llama.vocab_size
    arrays = (
        jnp.zeros((rows, length), jnp.int32),
        jnp.zeros((rows, length, tiny_config.llama.width)),
        jnp.ones(rows, jnp.int32),
        jnp.full(rows, length, jnp.int32),
    )
    program = jax.make_jaxpr(functools.partial(score_rows, model=model))(llama, *arrays)
    with_vocab = {shape for shape in shapes_in(program.jaxpr) if shape[-1:] == (vocab,)}
    assert (rows, BLOCK, vocab) in with_vocab
    assert all(len(shape) < 3 or shape[1] <= BLOCK for shape in with_vocab), with_vocab


def shapes_in(program: Any) -> Iterator[tuple[int, ...]]:
    for equation in program.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


def changed(question: Candidates, **changes: Any) -> Candidates:
    fields = {name: getattr(question, name) for name in ("prompt", "image_embeds", "answers")}
    return Candidates(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ()}, r"Question 1 has 5 prompt tokens and 0 answers"),
        ({"prompt": ()}, r"Question 1 has 0 prompt tokens and 6 answers"),
        ({"answers": ((5,), ())}, r"Answer 1 to question 1 is \[\]; expected ids of tokens"),
        ({"answers": ((5, IMAGE_TOKEN_ID),)}, r"Answer 0 to question 1 is \[5, -1\]"),
        ({"image_embeds": [np.zeros((2, 32), np.float32)]}, r"has 0 image slots and 2 image embed"),
        ({"answers": ((5,) * 124,)}, r"has 124 tokens and its prompt 5; expected at most 128"),
        ({"answers": ((10**6,),)}, r"of answer 0 to question 1 is nan; expected a finite number"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    score: Score, questions: list[Candidates], changes: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        score([questions[0], changed(questions[2], **changes)])


def test_the_longest_row_fills_the_context(score: Score, questions: list[Candidates]) -> None:
    ((found,),) = score([changed(questions[2], answers=((5,) * 123,))])
    assert found.num_tokens == 123


# --- the two orders ---


def answers(*sums: float, tokens: tuple[int, ...], prompt: int) -> list[AnswerScore]:
    return [AnswerScore(each, count, prompt) for each, count in zip(sums, tokens, strict=True)]


SCORES = [
    answers(-6.0, -2.0, -8.0, tokens=(2, 1, 8), prompt=11),
    answers(-9.0, -9.5, -1.0, tokens=(3, 5, 1), prompt=4),
]
"""By hand: the longest prompt has 11 tokens, the longest answers 3, 5 and 8; so 13, 15 and 18 places."""


def test_multi_select_divides_by_the_places_of_the_batch() -> None:
    losses, ranks = multi_select(SCORES)
    expected = [[6 / 13, 2 / 15, 8 / 18], [9 / 13, 9.5 / 15, 1 / 18]]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_array_equal(ranks, [[1, 2, 0], [2, 1, 0]])


def test_multi_select_puts_candidates_beyond_num_cand_last_in_their_order() -> None:
    losses, ranks = multi_select(SCORES, num_cand=[2, 1])
    assert losses[0, 2] == losses[1, 1] == losses[1, 2] == 9999
    np.testing.assert_array_equal(ranks, [[1, 0, 2], [0, 1, 2]])


@pytest.mark.parametrize("num_cand", [[3], [3, 4], [0, 3]])
def test_multi_select_refuses_numbers_that_do_not_fit(num_cand: list[int]) -> None:
    with pytest.raises(UserError, match=r"expected 2 numbers from 1 to 3"):
        multi_select(SCORES, num_cand=num_cand)


def test_multi_select_refuses_questions_with_different_numbers_of_candidates() -> None:
    with pytest.raises(UserError, match=r"have \[2, 3\] candidates"):
        multi_select([SCORES[0], SCORES[1][:2]])


def test_the_order_by_mean_is_that_of_the_mean_per_token_of_each_answer() -> None:
    assert rank_by_mean(SCORES[0]) == [2, 1, 0]  # -3, -2, -1
    assert rank_by_mean(SCORES[1]) == [2, 1, 0]  # -3, -1.9, -1
    tied = answers(-2.0, -1.0, -1.0, tokens=(1, 1, 1), prompt=3)
    assert rank_by_mean(tied) == [1, 2, 0]


def test_the_two_orders_differ_where_answers_differ_in_length() -> None:
    _, ranks = multi_select(SCORES)
    assert ranks[0].tolist() != rank_by_mean(SCORES[0])
