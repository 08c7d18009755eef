"""data/captions.py, apart from the pairs that the original produced (tests/parity/golden/test_golden_captions.py)."""

from __future__ import annotations

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.captions import blip_caption, get_processor


def test_a_web_caption_becomes_plain_words() -> None:
    assert blip_caption('The "BEST" dog -- ever! (#1)') == "the best dog -- ever 1"


def test_fifty_words_stay_and_the_prompt_does_not_count() -> None:
    words = [f"w{number}" for number in range(60)]
    assert blip_caption(" ".join(words)).split(" ") == words[:50]
    assert blip_caption("a b c", prompt="a photo of ", max_words=2) == "a photo of a b"


def test_an_unknown_processor_is_refused_with_the_known_ones() -> None:
    assert get_processor("none")("As IT is!") == "As IT is!"
    with pytest.raises(
        UserError, match="no caption processor 'blip'; expected one of none, blip_caption"
    ):
        get_processor("blip")
