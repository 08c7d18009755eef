"""What a program uses: load a model, talk about pictures, answer many questions at once.

    from minigpt4_jax import MiniGPT4

    chat = MiniGPT4.load("smol").start_chat()
    chat.add_image("examples/coffee.jpg")
    print(chat.ask("What is this?"))

Not for: arguments and printing (`cli.py`), HTTP (`serving/`), finding and reading weights (`loading.py`), or the
device loop (`generation/engine.py`).
Differs from the original, whose only interface is a Gradio page: a `Chat` keeps its own history, so one loaded model
serves any number of them.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from minigpt4_jax import loading
from minigpt4_jax.config import UserError
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.model_folder import find_preset
from minigpt4_jax.models.layout import DECODE
from minigpt4_jax.models.minigpt4 import Params
from minigpt4_jax.presets import MAX_SEED, GenerationConfig, Preset

__all__ = ["Chat", "GenerationConfig", "MiniGPT4"]

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | Path | bytes | Image.Image


class MiniGPT4:
    """A loaded model. Build one with `MiniGPT4.load`."""

    def __init__(
        self, preset: Preset, params: Params, tokenizer: Tokenizer, *, dtype: Any, context: int
    ) -> None:
        self.preset = preset
        self.tokenizer = tokenizer
        self.context = context
        self._engine = Engine(params, preset.model, dtype=dtype, context=context, num_slots=8)

    @classmethod
    def load(
        cls,
        name: str = "smol",
        *,
        projection: str | Path | None = None,
        dtype: str = "auto",
        context: int = 1024,
        progress: loading.Progress | None = None,
    ) -> MiniGPT4:
        """Loads a model. The first `load("smol")` fetches and converts its frozen parts into the cache.

        Args:
            name: `smol`, the preset whose weights this project can get by itself, or the model folder that
                `python -m convert` wrote: a path, or a URL such as `gs://bucket/vicuna-7b`.
            projection: a projection file; default: the one in the folder, and for `smol` the one that is shipped.
            dtype: `float32`, `bfloat16`, or `auto`: bfloat16 on an accelerator, float32 on a CPU.
            context: longest prompt plus answer of a conversation, in tokens; a picture takes 16 in `smol`.
            progress: told what is being converted on the first call.

        Raises:
            UserError: no such model, a download that failed, a damaged folder, a projection of another model.
        """
        preset = find_preset(name)
        storage = loading.pick_dtype(dtype)
        params, tokenizer = loading.load_decode_params(
            name, dtype=storage, layout=DECODE, projection=projection, progress=progress
        )
        return cls(preset, params, tokenizer, dtype=storage, context=context)

    def start_chat(self, generation: GenerationConfig | None = None) -> Chat:
        """A new conversation; any number may exist side by side. `generation` None is the preset's own."""
        return Chat(self, generation or self.preset.generation)

    def embed_images(self, pictures: Sequence[Picture]) -> Float[np.ndarray, "I T D"]:
        """Embeddings of pictures in the language model's space, float32 `[I, image tokens, width]`."""
        size = self.preset.model.vit.image_size
        pixels = [
            preprocess(
                load_image(picture),
                size=size,
                mean=self.preset.image_mean,
                std=self.preset.image_std,
            )
            for picture in pictures
        ]
        return np.stack(self._engine.encode_images(np.stack(pixels))).astype(np.float32)

    def generate(
        self,
        pictures: Sequence[Picture],
        questions: Sequence[str],
        *,
        generation: GenerationConfig | None = None,
    ) -> list[str]:
        """One answer per (picture, question) pair, decoded together; each is the answer that a chat gives alone.

        With a seed, every row draws by it; without one each row has a seed of its own.

        Raises:
            UserError: the numbers of pictures and questions differ, or a prompt does not fit the context.
        """
        if len(pictures) != len(questions):
            raise UserError(
                f"There are {len(pictures)} pictures and {len(questions)} questions; expected one question each."
            )
        if not pictures:
            return []
        config = generation or self.preset.generation
        chats = [self._conversation() for _ in questions]
        embeds = self.embed_images(pictures)
        prompts = []
        for chat, question, rows in zip(chats, questions, embeds, strict=True):
            chat.add_image(rows)
            prompts.append(chat.ask(question, room=config.max_new_tokens))
        shown, first = list(embeds), chats[0]
        if config.num_beams > 1:
            answers = self._search(prompts, shown, first, config, config.max_new_tokens)
        else:
            requests = [
                _request(prompt, [rows], first, config, seed=pick_seed(config))
                for prompt, rows in zip(prompts, shown, strict=True)
            ]
            answers = [generation.ids for generation in self._engine.generate(requests)]
        return [
            chat.add_answer(_read(chat, ids), ids) for chat, ids in zip(chats, answers, strict=True)
        ]

    def _search(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: Sequence[Float[np.ndarray, "_ D"] | None],
        chat: Conversation[Any],
        config: GenerationConfig,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """The best answer to each prompt that beams find; `chat` says what ends an answer and counts as written.

        As in the original a stop string ends no beam: the text behind it is cut off afterwards.
        """
        limited = dataclasses.replace(config, max_new_tokens=max_new_tokens)
        found = self._engine.beam_search(
            [
                _request(prompt, [] if rows is None else [rows], chat, limited, seed=0)
                for prompt, rows in zip(prompts, image_embeds, strict=True)
            ],
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
        )
        return [hypotheses[0].ids for hypotheses in found]

    def _conversation(self) -> Conversation[Float[np.ndarray, "T D"]]:
        return Conversation(
            get_template(self.preset.template),
            self.tokenizer,
            num_image_tokens=self.preset.model.num_image_tokens,
            context=self.context,
        )


class Chat:
    """One conversation with a model: pictures, questions, answers, all remembered."""

    def __init__(self, model: MiniGPT4, generation: GenerationConfig) -> None:
        self._model = model
        self._generation = generation
        self._conversation = model._conversation()
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
        self._conversation.add_image(self._model.embed_images([picture])[0])

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
            for token in self._write(prompt):
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

    def _write(self, prompt: Sequence[int]) -> Iterator[int]:
        """The ids of the answer to the last question."""
        chat, config = self._conversation, self._generation
        shown = np.concatenate(chat.pictures) if chat.pictures else None
        limit = min(config.max_new_tokens, chat.room)
        if config.num_beams > 1:
            (ids,) = self._model._search([prompt], [shown], chat, config, limit)
            yield from ids
            return
        limited = dataclasses.replace(config, max_new_tokens=limit)
        yield from self._model._engine.stream(
            _request(prompt, chat.pictures, chat, limited, seed=self.seed)
        )


def _read(chat: Conversation[Any], ids: Sequence[int]) -> str:
    stream = chat.answer_stream()
    for token in ids:
        stream.feed(token)
        if stream.stopped:
            break
    stream.finish()
    return stream.text


def pick_seed(generation: GenerationConfig) -> int:
    """The seed of one conversation: the one that was set, or a new one."""
    return secrets.randbelow(MAX_SEED + 1) if generation.seed is None else generation.seed


def _request(
    prompt: Sequence[int],
    image_embeds: Sequence[Any],
    chat: Conversation[Any],
    generation: GenerationConfig,
    *,
    seed: int,
) -> Request:
    """`chat` says what ends an answer and what counts as written."""
    return Request(
        prompt=prompt,
        image_embeds=image_embeds,
        max_new_tokens=generation.max_new_tokens,
        stop_tokens=chat.stop_ids,
        written=chat.written_ids,
        sampling=Sampling(
            repetition_penalty=generation.repetition_penalty,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            seed=seed,
        ),
    )
