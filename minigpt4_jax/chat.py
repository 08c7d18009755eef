"""One conversation with a model: pictures, questions and answers, all remembered.

For: a dialogue whose answers come in pieces and can be stopped. Not for: the text of a dialogue (`conversation.py`),
many questions at once (`answers.py`), terminals or HTTP.

Differs from the original, whose one conversation belongs to its web page, and which keeps no answer that was stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal

from minigpt4_jax.asking import make_request, pick_seed, search
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.image_cache import ImageEncoder, Picture
from minigpt4_jax.presets import GenerationConfig


class Chat:
    """A conversation. `MiniGPT4.start_chat` makes one; any number may exist side by side."""

    def __init__(
        self,
        engine: Engine,
        encoder: ImageEncoder,
        *,
        conversation: Conversation[Any],
        generation: GenerationConfig,
    ) -> None:
        self._engine, self._encoder = engine, encoder
        self._conversation, self._generation = conversation, generation
        self.seed = pick_seed(generation)
        """By which answers are drawn: the one that was asked for, or the one that was picked for this conversation."""
        self.last_answer = ""
        """The newest answer, cleaned."""
        self.finish_reason: Literal["", "stop", "length", "cancelled"] = ""
        """Why it ended: by itself, at `max_new_tokens` or the end of the context, or because the caller stopped."""

    def add_image(self, picture: Picture) -> None:
        """Shows a picture; the next question is about it. At any time, any number: all of them stay in view.

        Encoded once, whatever is asked later.

        Raises:
            ContextFull: the conversation has no room for it; nothing was added.
            UserError: it is not a picture.
        """
        self._conversation.add_image(self._encoder.embed([picture])[0])

    def ask(self, question: str) -> str:
        """Asks and returns the whole answer."""
        for _ in self.stream(question):
            pass
        return self.last_answer

    def stream(self, question: str) -> Iterator[str]:
        """Asks and yields the answer in pieces of text as it is written; with beams in one piece, when it is found.

        What was written so far enters the history also when the caller stops early (closes the iterator, or Ctrl-C).

        Raises:
            ContextFull: the question does not fit; nothing was added to the conversation.
        """
        prompt = self._conversation.ask(question)
        answer = self._conversation.answer_stream()
        whole = self._generation.num_beams > 1
        self.finish_reason = "cancelled"
        try:
            with contextlib.closing(self._write(prompt)) as written:
                for token in written:
                    piece = answer.feed(token)
                    if piece and not whole:
                        yield piece
                    if answer.stopped:
                        break
            reason: Literal["stop", "length"] = "stop" if answer.stopped else "length"
            rest = answer.finish()
            if whole:
                rest = answer.text
            if rest:
                yield rest
            self.finish_reason = reason
        finally:
            self.last_answer = self._conversation.add_answer(answer.text, answer.ids)

    def _write(self, prompt: Sequence[int]) -> Generator[int, None, None]:
        """The ids of the answer to the last question. Closing it takes the request back."""
        chat, config = self._conversation, self._generation
        limit = min(config.max_new_tokens, chat.room)
        request = make_request(
            chat, prompt, chat.pictures, generation=config, seed=self.seed, max_new_tokens=limit
        )
        if config.num_beams > 1:
            yield from search(self._engine, [request], generation=config)[0][0]
        else:
            yield from self._engine.stream(request)
