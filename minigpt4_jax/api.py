"""What a program uses: load a model, talk about pictures, answer many questions at once.

    from minigpt4_jax import MiniGPT4

    model = MiniGPT4.load("smol")
    print(model.generate(["examples/coffee.jpg", "examples/flower.jpg"], ["What is this?"] * 2))

Not for: arguments and printing (`cli.py`), HTTP (`serving/`), finding and reading weights (`loading.py`), or the
device loop (`generation/engine.py`).
Differs from the original, whose only interface is a Gradio page: one loaded model serves any number of conversations
and batches, and keeps the embeddings of pictures that it has seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from minigpt4_jax import loading
from minigpt4_jax.answers import Answer, AnswerRun, Ask, KeyT, Outcome
from minigpt4_jax.asking import Scored, rank
from minigpt4_jax.chat import Chat
from minigpt4_jax.config import UserError
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.image_cache import MAX_BYTES, ImageCache, ImageEncoder, Picture, PreparedImage
from minigpt4_jax.model_folder import find_preset
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, Layout
from minigpt4_jax.models.minigpt4 import Params
from minigpt4_jax.presets import GenerationConfig, Preset

__all__ = ["Answer", "Ask", "Chat", "GenerationConfig", "MiniGPT4", "Scored"]

Shown = Picture | Sequence[Picture] | None
"""What a question is about: a picture, several, or none."""


class MiniGPT4:
    """A loaded model. Build one with `MiniGPT4.load`. Use it from one thread at a time."""

    def __init__(
        self,
        preset: Preset,
        params: Params,
        tokenizer: Tokenizer,
        *,
        dtype: Any,
        layout: Layout,
        cache_dtype: Any,
        context: int,
        num_slots: int,
        fingerprint: str,
    ) -> None:
        self.preset = preset
        self.tokenizer = tokenizer
        self.context = context
        self.fingerprint = fingerprint
        """Of weights and dtypes: what equals it gives the same answers."""
        self.engine = Engine(
            params,
            preset.model,
            dtype=dtype,
            layout=layout,
            cache_dtype=cache_dtype,
            context=context,
            num_slots=num_slots,
        )
        """What writes answers. For who drives it themselves, as the server does; never from two threads at once."""
        self.image_cache = ImageCache(MAX_BYTES)
        """Embeddings of the pictures that were shown last; counts its hits and misses."""
        self.encoder = ImageEncoder(
            self.engine.encode_images,
            self.image_cache,
            model=fingerprint,
            size=preset.model.vit.image_size,
            mean=preset.image_mean,
            std=preset.image_std,
        )
        """From pictures to embeddings. Its `prepare` may be called from any thread, `embed` only from the engine's."""

    @classmethod
    def load(
        cls,
        name: str = "smol",
        *,
        projection: str | Path | None = None,
        weights: str = "auto",
        cache: str = "auto",
        context: int = 1024,
        num_slots: int = 8,
        progress: loading.Progress | None = None,
    ) -> MiniGPT4:
        """Loads a model. The first `load("smol")` fetches and converts its frozen parts into the cache.

        Args:
            name: `smol`, the preset whose weights this project can get by itself, or the model folder that
                `python -m convert` wrote: a path, or a URL such as `gs://bucket/vicuna-7b`.
            projection: a projection file; default: the one in the folder, and for `smol` the one that is shipped.
            weights: `float32`, `bfloat16`, `int8` (the language model's matrices, with one scale per output channel;
                everything else as with `auto`), or `auto`: bfloat16 on an accelerator, float32 on a CPU.
            cache: `int8` (with one scale per token and head), or `auto`: the dtype that is computed in.
            context: longest prompt plus answer of a conversation, in tokens; a picture takes 16 in `smol`.
            num_slots: answers that are written side by side; the memory of the cache grows with it.
            progress: told what is being converted on the first call.

        Raises:
            UserError: no such model, a download that failed, a damaged folder, a projection of another model.
        """
        _check_choice("weights", weights, ("auto", "float32", "bfloat16", "int8"))
        _check_choice("cache", cache, ("auto", "int8"))
        preset = find_preset(name)
        dtype = loading.pick_dtype("auto" if weights == "int8" else weights)
        layout = DECODE_INT8 if weights == "int8" else DECODE
        params, tokenizer = loading.load_decode_params(
            name, dtype=dtype, layout=layout, projection=projection, progress=progress
        )
        return cls(
            preset,
            params,
            tokenizer,
            dtype=dtype,
            layout=layout,
            cache_dtype=jnp.int8 if cache == "int8" else dtype,
            context=context,
            num_slots=num_slots,
            fingerprint=_fingerprint(
                name, params["llama_proj"], settings=(dtype.name, layout.int8, cache)
            ),
        )

    # --- one question at a time ---

    def start_chat(self, generation: GenerationConfig | None = None) -> Chat:
        """A new conversation; any number may exist side by side. `generation` None is the preset's own."""
        return Chat(
            self.engine,
            self.encoder,
            conversation=self.start_conversation(),
            generation=generation or self.preset.generation,
        )

    def stream(
        self, images: Shown, prompt: str, *, generation: GenerationConfig | None = None
    ) -> Iterator[str]:
        """Yields the answer to one question in pieces of text, as it is written. Closing the iterator stops it.

        Args:
            images: what it is about, in order: a picture, several, or None.

        Raises:
            ContextFull: question or pictures do not fit.
            UserError: one of them is no picture.
        """
        chat = self.start_chat(generation)
        for picture in _pictures(images):
            chat.add_image(picture)
        return chat.stream(prompt)

    # --- many questions at once ---

    @overload
    def generate(
        self,
        images: Sequence[Shown],
        prompts: Sequence[str],
        *,
        generation: GenerationConfig | None = None,
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        images: Sequence[Shown],
        prompts: Sequence[str],
        *,
        generation: GenerationConfig | None = None,
        n: int,
        logprobs: bool = False,
    ) -> list[list[Answer]]: ...
    def generate(
        self,
        images: Sequence[Shown],
        prompts: Sequence[str],
        *,
        generation: GenerationConfig | None = None,
        n: int | None = None,
        logprobs: bool = False,
    ) -> list[str] | list[list[Answer]]:
        """The answer to each prompt, in order; each is the one that a chat gives alone.

        The simple call returns texts. With `n` it returns `n` `Answer`s to each prompt, which also tell their ids, why
        they ended and, with `logprobs`, how likely every token was.

        Args:
            images: what each prompt is about: a picture, several (a list), or None.
            generation: how answers are written; None is the preset's own. With a seed every prompt draws by it (and
                the `i`-th of `n` answers by `seed + i`); without one every answer has a seed of its own.

        Raises:
            UserError: the numbers of images and prompts differ, a picture cannot be opened, a prompt does not fit the
                context, or `n` answers would all be the same.
        """
        if isinstance(prompts, str) or len(images) != len(prompts):
            found = "one str" if isinstance(prompts, str) else str(len(prompts))
            raise UserError(
                f"There are {len(images)} entries in images and {found} in prompts; expected two lists of one length, "
                "with a picture, a list of pictures or None for each prompt."
            )
        if logprobs and n is None:
            raise UserError("logprobs is True without n; expected n (1 or more) with it.")
        asks = [
            Ask(key=place, images=_pictures(shown), prompt=prompt)
            for place, (shown, prompt) in enumerate(zip(images, prompts, strict=True))
        ]
        found_for: dict[int, list[Answer]] = {}
        for place, outcome in self.answer_each(
            asks, generation=generation, n=n or 1, logprobs=logprobs
        ):
            if isinstance(outcome, UserError):
                raise outcome
            found_for[place] = list(outcome)
        answers = [found_for[place] for place in range(len(prompts))]
        return [first.text for first, *_ in answers] if n is None else answers

    def answer_each(
        self,
        asks: Iterable[Ask[KeyT]],
        *,
        generation: GenerationConfig | None = None,
        n: int = 1,
        logprobs: bool = False,
    ) -> Generator[tuple[KeyT, Outcome], None, None]:
        """Yields (key, answers) of each question as it is finished, whatever their number: they are taken as needed.

        A question that cannot be asked (a bad picture, a prompt that does not fit) is answered with the `UserError`
        that says why, and the others go on. No more than `2 * num_slots` questions are taken ahead. Closing the
        iterator takes back what is being written. Seeds, `n` and `logprobs` as in `generate`.
        """
        run: AnswerRun[KeyT] = AnswerRun(
            self.engine,
            self.encoder,
            self.start_conversation,
            generation=generation or self.preset.generation,
            n=n,
            logprobs=logprobs,
        )
        return run.answer(asks)

    # --- pictures and likelihoods ---

    def embed_images(self, pictures: Sequence[Picture]) -> Float[np.ndarray, "I T D"]:
        """Embeddings of pictures in the language model's space, float32 `[I, image tokens, width]`.

        Encoded together; a picture that was shown before, to a chat too, is not encoded again.
        """
        config = self.preset.model
        found = np.zeros((len(pictures), config.num_image_tokens, config.llama.width), np.float32)
        for place, embeds in enumerate(self.encoder.embed(pictures)):
            found[place] = np.asarray(embeds, np.float32)
        return found

    def score(
        self,
        images: Shown,
        prompt: str,
        candidates: Sequence[str],
        *,
        normalise: str = "tokens",
    ) -> list[Scored]:
        """Candidates as answers to a question, the likeliest first; of equal ones the earlier.

        A candidate counts with the end symbol that answers were trained with.

        Args:
            images: as in `stream`.
            normalise: `tokens` divides a log-probability by the candidate's number of tokens, so that long ones are
                not at a disadvantage; `none` compares probabilities; `original` is the original's `multi_select`,
                which divides by the tokens of prompt and candidate together.

        Raises:
            UserError: no candidate, an empty one, another `normalise`, or a prompt that does not fit the context.
        """
        chat = self.start_conversation()
        for embeds in self.encoder.embed(_pictures(images)):
            chat.add_image(embeds)
        return rank(
            self.engine,
            chat,
            prompt=prompt,
            candidates=candidates,
            tokenizer=self.tokenizer,
            normalise=normalise,
        )

    def start_conversation(self, *, system: str | None = None) -> Conversation[Any]:
        """The text side of a new dialogue, for who drives the engine; `system` None is the template's own."""
        return Conversation(
            get_template(self.preset.template),
            self.tokenizer,
            num_image_tokens=self.preset.model.num_image_tokens,
            context=self.context,
            system=system,
        )


def _pictures(shown: Shown) -> Sequence[Picture]:
    if shown is None:
        return ()
    if isinstance(shown, str | Path | bytes | Image.Image | PreparedImage):
        return (shown,)
    return shown


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def _fingerprint(name: str, llama_proj: Params, *, settings: Sequence[object]) -> str:
    """SHA-256 over what the frozen parts came from, the projection's own bytes, and how all of it is kept."""
    digest = hashlib.sha256()
    for key in sorted(llama_proj):
        digest.update(f"{key}:".encode())
        digest.update(np.asarray(llama_proj[key]).tobytes())
    parts = [loading.frozen_parts(name), digest.hexdigest(), *settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
