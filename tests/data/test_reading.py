"""data/reading.py: a stand-in for a picture that turns out corrupt is never longer than the batch it joins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import size_of
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import replacement
from minigpt4_jax.data.padding import Padding
from minigpt4_jax.data.pixels import PictureReader
from minigpt4_jax.data.prompts import VICUNA_V0
from minigpt4_jax.data.reading import Pick, SampleReader
from minigpt4_jax.data.tokenizer import byte_tokenizer
from tests.data.sets import Captioned

READER = PictureReader(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PICK = Pick(0, 0, 0)


def reader(source: Captioned, **changes: Any) -> SampleReader:
    encoder = Encoder(
        VICUNA_V0, byte_tokenizer(), prompts=(None,), num_image_tokens=2, max_text_len=40
    )
    settings: dict[str, Any] = {
        "padding": Padding(length_multiple=8, max_text_len=40), "seed": 3, "pictures": READER, "bad_images": {},
    }  # fmt: skip
    return SampleReader([Part("set", source)], encoder, **(settings | changes))


def test_the_stand_in_is_the_first_of_its_row_that_fits_and_is_whole() -> None:
    # Sample 0 has no picture. Every second of the others is too long to take its place.
    source = Captioned(["short" + "er" * 8 * (n % 2) for n in range(12)], broken=[0, 4])
    made = reader(source)
    words = made.read_words(PICK)
    shape = size_of(words.tokens)
    found = made.read_picture(words, shape=shape)
    attempts = [replacement(0, attempt, size=12) for attempt in range(1, 60)]
    expected = next(index for index in attempts if index % 2 == 0 and index not in (0, 4))
    assert attempts[0] != expected, "the case has no stand-in that is too long"
    assert found.image_index == expected
    assert found.fault is not None
    assert (found.fault.sample, found.fault.reason) == (0, "empty image")
    longer = made.read_picture(words, shape=(99, 99))
    assert longer.image_index == next(index for index in attempts if index not in (0, 4))


def test_where_nothing_fits_the_row_keeps_its_words_and_counts_nothing() -> None:
    made = reader(Captioned(["a", *["much longer"] * 8], broken=[0]))
    words = made.read_words(PICK)
    found = made.read_picture(words, shape=size_of(words.tokens))
    np.testing.assert_array_equal(found.tokens.token_ids, words.tokens.token_ids)
    assert not found.tokens.loss_mask.any()
    assert found.pixels is not None
    assert not found.pixels.any()
    assert found.fault is not None
    assert found.fault.sample == 0


def test_words_that_no_bucket_holds_have_a_stand_in_from_the_start() -> None:
    made = reader(
        Captioned(["far too long for it", "ok", "so"], late=True),
        padding=Padding(length_multiple=8, buckets=(12,), max_text_len=40),
    )
    words = made.read_words(PICK)
    assert words.sample in (1, 2)
    assert words.attempt > 0
    assert [fault.reason for fault in words.faults] == ["text does not fit"] * words.attempt
    found = made.read_picture(words, shape=(12, 40))
    assert found.fault is not None
    assert "caption 0 has 25 tokens in all; expected at most 12" in found.fault.message


def test_eight_corrupt_stand_ins_are_too_many_also_behind_words_that_were_corrupt() -> None:
    source = Captioned(["far too long for it", "ok", "so"], broken=range(3), late=True)
    made = reader(source, padding=Padding(length_multiple=8, buckets=(12,), max_text_len=40))
    with pytest.raises(UserError, match=r"Sample 0 of source 'set' is corrupt.*all 8"):
        made.read_picture(made.read_words(PICK), shape=(12, 40))


def test_a_picture_is_cropped_the_same_whenever_it_is_read() -> None:
    crop = PictureReader(size=8, mean=READER.mean, std=READER.std, random_resized_crop=True)
    made = reader(Captioned(["a", "b"]), pictures=crop)
    words = made.read_words(PICK)
    made.read_words(Pick(0, 1, 0))
    first, again = (made.read_picture(words, shape=(99, 99)).pixels for _ in range(2))
    np.testing.assert_array_equal(first, again)
    later = made.read_words(Pick(0, 0, 1))
    assert (made.read_picture(later, shape=(99, 99)).pixels != first).any()
