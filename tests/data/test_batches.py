"""Claims about `minigpt4_jax.data.batches`."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, UserError
from minigpt4_jax.data.batches import (
    Batch,
    collate,
    join_example,
    limit_prompt,
    make_example_tokens,
    wrap_images,
)
from minigpt4_jax.data.prompts import CHATML, VICUNA_V0
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def targets(batch: Batch, row: int) -> list[tuple[int, int]]:
    mask = batch["target_mask"][row]
    return list(
        zip(
            batch["target_positions"][row][mask].tolist(),
            batch["target_ids"][row][mask].tolist(),
            strict=True,
        )
    )


def test_pictures_stand_between_the_segments_of_a_prompt() -> None:
    assert wrap_images([[5, 6], [7]], 3) == [5, 6, -1, -1, -1, 7]
    assert wrap_images([[], [7], []], 2) == [-1, -1, 7, -1, -1]
    assert wrap_images([[5]], 3) == [5]


def test_only_the_answer_counts_and_each_token_is_predicted_from_the_one_before() -> None:
    batch = collate([join_example([1, -1, -1, 4], [10, 11, 2])], [0], length_multiple=1)
    assert batch["token_ids"].tolist() == [[1, -1, -1, 4, 10, 11, 2]]
    assert targets(batch, 0) == [(3, 10), (4, 11), (5, 2)]


def test_ignored_tokens_are_attended_to_but_do_not_count() -> None:
    example = join_example([1, 45], [10, 45, 2], ignored_targets=(45,))
    batch = collate([example], [0], length_multiple=1)
    assert targets(batch, 0) == [(1, 10), (3, 2)]
    assert batch["attention_mask"].all()


@pytest.mark.parametrize(("prompt", "answer"), [([], [1]), ([1], [])])
def test_a_sample_needs_a_prompt_and_an_answer(prompt: list[int], answer: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        join_example(prompt, answer)


def test_a_chatml_sample_is_prompt_picture_answer_end(tokenizer: Tokenizer) -> None:
    example = make_example_tokens(
        CHATML, tokenizer, prompt="Why?", answer="So.", num_image_tokens=2, max_text_len=10
    )
    start, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
    encode = tokenizer.encode
    assert example.token_ids.tolist() == [
        start, *encode("user\n"), IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, *encode("Why?"), end, *encode("\n"),
        start, *encode("assistant\n"), *encode("So."), end,
    ]  # fmt: skip
    assert example.loss_mask.tolist() == [False] * (len(example.token_ids) - 4) + [True] * 4


def test_the_first_stage_is_bos_picture_caption(tokenizer: Tokenizer) -> None:
    example = make_example_tokens(
        VICUNA_V0, tokenizer, prompt=None, answer="a cat", num_image_tokens=2, max_text_len=32, end_symbol=("\n",),
    )  # fmt: skip
    assert example.token_ids.tolist() == [
        tokenizer.special("<s>"), -1, -1, *tokenizer.encode("a cat\n"),
    ]  # fmt: skip


def test_a_long_answer_is_an_error_that_names_the_sample(tokenizer: Tokenizer) -> None:
    def make(max_text_len: int, *, truncate: bool) -> object:
        return make_example_tokens(
            CHATML, tokenizer, prompt="Why?", answer="12345", num_image_tokens=1, max_text_len=max_text_len,
            name="picture 7", truncate=truncate,
        )  # fmt: skip

    make(6, truncate=False)
    with pytest.raises(UserError, match=r"picture 7 has 6 tokens .* at most 5"):
        make(5, truncate=False)
    cut = make(4, truncate=True)
    assert cut.cut_tokens == 2
    assert cut.token_ids[-4:].tolist() == tokenizer.encode("1234")


def test_a_long_prompt_is_an_error_or_cut_on_its_right_the_bos_not_counted() -> None:
    prompt = [1, -1, -1, 7, 8]
    limits = {"num_bos": 1, "name": "prompt 'Why?'"}
    assert limit_prompt(prompt, max_context_len=4, truncate=False, **limits) == (prompt, 0)
    with pytest.raises(UserError, match=r"prompt 'Why\?' has 4 tokens .* at most 3"):
        limit_prompt(prompt, max_context_len=3, truncate=False, **limits)
    assert limit_prompt(prompt, max_context_len=1, truncate=True, **limits) == ([1, -1], 3)


def test_padding_rounds_up_and_keeps_every_token() -> None:
    examples = [join_example([1] * n, [7] * m) for n, m in ((3, 2), (6, 3), (1, 1))]
    batch = collate(examples, [4, 0, 9], length_multiple=4)
    assert batch["token_ids"].shape == batch["attention_mask"].shape == (3, 12)
    assert batch["target_ids"].shape == batch["target_mask"].shape == (3, 4)
    assert batch["image_index"].tolist() == [4, 0, 9]
    for row, example in enumerate(examples):
        size = len(example.token_ids)
        assert batch["attention_mask"][row].tolist() == [True] * size + [False] * (12 - size)
        assert batch["token_ids"][row, :size].tolist() == example.token_ids.tolist()
        assert not batch["token_ids"][row, size:].any()
        assert [token for _, token in targets(batch, row)] == example.token_ids[example.loss_mask].tolist()  # fmt: skip


def test_lengths_that_fit_exactly_are_not_padded_further() -> None:
    batch = collate([join_example([1] * 4, [7] * 4)], [0], length_multiple=4)
    assert (batch["token_ids"].shape[1], batch["target_ids"].shape[1]) == (8, 4)


def test_a_batch_is_int32_and_bool() -> None:
    batch = collate([join_example([1], [2])], [0], length_multiple=8)
    assert {name: array.dtype for name, array in batch.items()} == {
        "token_ids": np.int32,
        "attention_mask": np.bool_,
        "target_positions": np.int32,
        "target_ids": np.int32,
        "target_mask": np.bool_,
        "image_index": np.int32,
    }


def test_a_sample_without_any_target_still_makes_a_batch() -> None:
    batch = collate([join_example([1], [5], ignored_targets=(5,))], [0], length_multiple=4)
    assert not batch["target_mask"].any()
    assert batch["target_ids"].shape == (1, 4)


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="1 samples with 2 picture rows"):
        collate([join_example([1], [2])], [0, 1], length_multiple=1)
    with pytest.raises(ValueError, match="at least one"):
        collate([], [], length_multiple=1)
