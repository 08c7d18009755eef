"""data/captions.py: the caption pairs that the original's `blip_caption` produced, as the set's report holds them."""

from __future__ import annotations

import re
from typing import Any

from minigpt4_jax.data.captions import blip_caption


def test_golden_captions(golden: Any, caption_case: tuple[str, int]) -> None:
    configuration, number = caption_case
    pairs = golden.report("images/report.json")["blip_caption"][configuration]
    caption, expected = pairs[number]
    settings: dict[str, Any] = {}
    if "prompt" in configuration:
        settings["prompt"] = common_start([result for _, result in pairs])
    if words := re.search(r"max_words_(\d+)", configuration):
        settings["max_words"] = int(words[1])
    assert blip_caption(caption, **settings) == expected


def common_start(texts: list[str]) -> str:
    """The report does not hold the prompt of a configuration, but all its results begin with it."""
    shortest = min(texts, key=len)
    ends = range(len(shortest), -1, -1)
    return next(shortest[:end] for end in ends if all(t.startswith(shortest[:end]) for t in texts))
