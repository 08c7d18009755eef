"""training/loop.py's `make_batches`: the set's first batch in the words of the settings, and what is cut of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig, UserError
from minigpt4_jax.data.datasets import open_sources
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer
from minigpt4_jax.presets import get_preset
from minigpt4_jax.sharding import make_mesh
from minigpt4_jax.training import loop
from minigpt4_jax.training.features import Encoded
from minigpt4_jax.training.vision import CachedVision


@pytest.fixture
def batches_of(make_config: Any, tmp_path: Path) -> Any:
    """`batches_of("key=value", ...)`: the first batch of the set in the words of these settings."""
    vision = CachedVision(
        Encoded(np.zeros((0, 1, 1), np.float16), {}), mesh=make_mesh(data=8)
    )  # words alone

    def call(*overrides: str, tokenizer: Tokenizer | None = None) -> Any:
        config = make_config(tmp_path, *overrides)
        parts = open_sources(config.data, progress=lambda done, of: None)
        with loop.make_batches(
            config, get_preset("tiny"), parts, vision, tokenizer or byte_tokenizer()
        ) as batches:
            return next(batches)

    return call


def first_row(batch: Any) -> list[int]:
    return batch["token_ids"][0][batch["attention_mask"][0]].tolist()


def first_answer(batch: Any) -> list[int]:
    return batch["target_ids"][0][batch["target_mask"][0]].tolist()


def test_no_prompt_at_all_is_bos_picture_caption_and_end_symbol(
    batches_of: Any, tiny_config: ModelConfig
) -> None:
    tokenizer = byte_tokenizer()
    settings = ("data.prompts=[]", "data.template=vicuna_v0")
    batch = batches_of(*settings, r'data.end_sym="\n"')
    picture = [IMAGE_TOKEN_ID] * tiny_config.num_image_tokens
    answer = first_answer(batch)
    assert first_row(batch) == [tokenizer.special("<s>"), *picture, *answer]
    assert tokenizer.decode(answer).endswith("\n")
    assert tokenizer.decode(first_answer(batches_of(*settings))).endswith("###")
    control = first_answer(batches_of(*settings, "data.end_sym=</s>"))
    assert control[-1] == tokenizer.special("</s>")


def test_a_prompt_file_asks_its_questions(batches_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "alignment.txt"
    file.write_text("<Img><ImageHere></Img> Describe it.\n")
    # The list must be at its default: two sources of prompts are a contradiction.
    batch = batches_of("data.prompts=['What is this?']", f"data.prompt_path={file}")
    asked = byte_tokenizer().decode([i for i in first_row(batch) if i != IMAGE_TOKEN_ID])
    assert "Describe it." in asked
    with pytest.raises(UserError, match=r"data.prompts is \['Who\?'\]; expected one of the two"):
        batches_of("data.prompts=['Who?']", f"data.prompt_path={file}")


def test_what_is_too_long_is_cut_only_when_told_to_and_counted(
    batches_of: Any, capsys: pytest.CaptureFixture[str], tiny_config: ModelConfig
) -> None:
    prompts = "data.prompts=['Is it?', 'What in the world is this?']"
    # Captions have 7 to 10 letters, one token each; the two of 7 fit with their end symbol.
    for limit in ("data.max_text_len=8", "data.max_context_len=30"):
        with pytest.raises(UserError, match=limit.partition("=")[0]):
            batches_of(prompts, limit)
    assert capsys.readouterr().out == ""
    longest = tiny_config.num_image_tokens + len("user\nassistant\nIs it?\n") + 3
    batch = batches_of(
        prompts, "data.truncate=true", "data.max_text_len=8", f"data.max_context_len={longest}"
    )
    assert capsys.readouterr().out == (
        "data.truncate: 10 of 12 answers cut to 8 tokens (without an end symbol), 1 prompts to "
        f"{longest}.\n"
    )
    assert batch["target_mask"].sum(axis=1).max() == 8


def test_the_pad_token_can_be_left_out_of_the_loss_unless_it_is_the_end_symbol(
    batches_of: Any,
) -> None:
    # The byte tokenizer pads with <|im_end|>, which ChatML also ends with.
    with pytest.raises(UserError, match=r"part of the end symbol '<\|im_end\|>'"):
        batches_of("data.mask_pad_token=true")
    # One whose pad token is an ordinary piece, as the original's `$$` is: here the letter e.
    tokenizer = Tokenizer(byte_tokenizer()._backend, bos_token=None, eos_token=None, pad_token="e")
    whole = batches_of(tokenizer=tokenizer)
    masked = batches_of("data.mask_pad_token=true", tokenizer=tokenizer)
    np.testing.assert_array_equal(masked["token_ids"], whole["token_ids"])
    answers = [whole["target_ids"][row][mask] for row, mask in enumerate(whole["target_mask"])]
    left = [masked["target_ids"][row][mask] for row, mask in enumerate(masked["target_mask"])]
    assert any(tokenizer.pad_id in answer for answer in answers)
    for answer, rest in zip(answers, left, strict=True):
        assert rest.tolist() == [i for i in answer.tolist() if i != tokenizer.pad_id]
