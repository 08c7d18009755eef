"""What the api's tests share beside fixtures: settings, the engine's recorder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from minigpt4_jax import Chat, GenerationConfig, MiniGPT4
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request

CONTEXT = 200
# The model has more rows than the tokenizer has ids; a draw from this many of the likeliest stays among the printable.
PRINTABLE = 20
# The penalty keeps a random model from saying one letter over and over, whatever it sees.
SHORT = GenerationConfig(max_new_tokens=12, repetition_penalty=3.0)


class Recorder:
    """Notes what the engine is asked, and answers with scripted ids where there are some."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[Request] = []
        self.script: list[Iterable[int]] = []
        real = engine.stream

        def stream(request: Request) -> Iterator[int]:
            self.requests.append(request)
            ids = self.script.pop(0) if self.script else real(request)
            yield from ids

        monkeypatch.setattr(engine, "stream", stream)

    @property
    def prompts(self) -> list[list[int]]:
        return [list(request.prompt) for request in self.requests]


def start(model: MiniGPT4, *pictures: Any) -> Chat:
    chat = model.start_chat(SHORT)
    for picture in pictures:
        chat.add_image(picture)
    return chat
