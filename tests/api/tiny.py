"""What the api's tests share beside fixtures: settings, the frozen parts, the engine's recorder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import Chat, GenerationConfig, MiniGPT4
from minigpt4_jax.data.tokenizer import Tokenizer

CONTEXT = 200
# The model has more rows than the tokenizer has ids; a draw from this many of the likeliest stays among the printable.
PRINTABLE = 20
# The penalty keeps a random model from saying one letter over and over, whatever it sees.
SHORT = GenerationConfig(max_new_tokens=12, repetition_penalty=3.0)


def make_frozen(params: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The frozen parts, made to write printable text only."""
    embedding = np.array(params["llama"]["embed_tokens"]["embedding"])
    printable = tokenizer.encode("".join(map(chr, range(32, 127))))
    silent = np.setdiff1d(np.arange(len(embedding)), printable)
    embedding[silent] = 0  # tied to the head: a logit of 0, and some other logit is always above it
    llama = {**params["llama"], "embed_tokens": {"embedding": jnp.asarray(embedding)}}
    return {"vit": params["vit"], "ln_vision": params["ln_vision"], "llama": llama}


class Recorder:
    """Notes what the engine is asked, and answers with scripted ids where there are some."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[list[int]] = []
        self.embeds: list[Any] = []
        self.settings: list[dict[str, Any]] = []
        self.script: list[list[int]] = []
        real = engine.stream

        def stream(prompt: Sequence[int], embeds: Any, **settings: Any) -> Iterator[int]:
            self.prompts.append(list(prompt))
            self.embeds.append(embeds)
            self.settings.append(settings)
            if self.script:
                return iter(self.script.pop(0))
            answered: Iterator[int] = real(prompt, embeds, **settings)
            return answered

        monkeypatch.setattr(engine, "stream", stream)


def start(model: MiniGPT4, *pictures: Any) -> Chat:
    chat = model.start_chat(SHORT)
    for picture in pictures:
        chat.add_image(picture)
    return chat
