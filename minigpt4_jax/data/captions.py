"""Caption processors: what is done to an answer before it is tokenised.

For: `blip_caption`, with which the original reads its web captions. Not for: prompts and end symbols (`prompts.py`).

Differs from the original only in that it is a function; the steps and their order are those of
`minigpt4/processors/blip_processors.py`. Note what they leave in: tabs and single line breaks stay, as it collapses
only runs of two or more white-space characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from minigpt4_jax.config import UserError

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_RUNS = re.compile(r"\s{2,}")


def blip_caption(caption: str, *, prompt: str = "", max_words: int = 50) -> str:
    """Lower case, `. ! " ( ) * # : ; ~` to spaces, runs of white space to one, at most `max_words` words.

    A word is what stands between single spaces. `prompt` goes in front and does not count.
    """
    text = _RUNS.sub(" ", _PUNCTUATION.sub(" ", caption.lower())).rstrip("\n").strip(" ")
    words = text.split(" ")
    return prompt + (text if len(words) <= max_words else " ".join(words[:max_words]))


def as_it_is(caption: str) -> str:
    """The caption, untouched."""
    return caption


PROCESSORS: dict[str, Callable[[str], str]] = {"none": as_it_is, "blip_caption": blip_caption}


def get_processor(name: str) -> Callable[[str], str]:
    """Looks a processor up. Raises `UserError` with the known names."""
    if name not in PROCESSORS:
        raise UserError(
            f"There is no caption processor {name!r}; expected one of {', '.join(PROCESSORS)}."
        )
    return PROCESSORS[name]
