"""What a model says of pictures while its projection is being trained: the callback that `training.loop.train` takes.

For: `Captioner`, which has the frozen weights once more, in the layout of the decode engine, and is given another
projection each time. Not for: which pictures, when (`training/held_out.py`), and where the answers go
(`training/captions.py`).

The memory is a second copy of the model on one device (15.7 GB for 7B in bfloat16): training and decoding read
differently laid out weights, so they cannot share one. It is read anew for each look and gone behind it: what a step
needs is not there twice. `held_out.captions=0` does without.
Differs from the original, which shows answers only in its demo, from a checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minigpt4_jax import loading
from minigpt4_jax.conversation import AnswerStream
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.data.prompts import (
    clean_answer,
    encode_prompt,
    get_template,
    training_pieces,
)
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.model_folder import find_preset
from minigpt4_jax.models.layout import DECODE
from minigpt4_jax.models.minigpt4 import Params
from minigpt4_jax.train_config import TrainConfig

SIDE_BY_SIDE = 4
"""Answers written at once."""


class Captioner:
    """Answers about pictures, likeliest word first, in the very words that the run trains with.

    Weights are loaded at each call and kept by none; compiled programs are kept. Raises what
    `loading.load_decode_params` raises.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._preset = find_preset(config.model)
        self._template = get_template(config.data.template)
        self._engine: Engine | None = None

    def __call__(
        self, projection: Params, pictures: Sequence[bytes], prompts: Sequence[str | None]
    ) -> list[str]:
        """One answer for each picture.

        Args:
            projection: `llama_proj` as it is now, float32.
            pictures: their files.
            prompts: what each is asked; None shows the bare picture, as the original's first stage does.
        """
        engine, tokenizer = self._load(projection, prompts)
        answers = self._answer(engine, tokenizer, pictures, prompts)
        engine.drop_params()
        self._engine = engine
        return answers

    def _answer(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        pictures: Sequence[bytes],
        prompts: Sequence[str | None],
    ) -> list[str]:
        preset = self._preset
        pixels = [
            preprocess(
                load_image(picture),
                size=preset.model.vit.image_size,
                mean=preset.image_mean,
                std=preset.image_std,
            )
            for picture in pictures
        ]
        stop_ids = self._stop_ids(tokenizer)
        requests = []
        for prompt, embeds in zip(prompts, engine.encode_images(np.stack(pixels)), strict=True):
            ids = self._prompt_ids(prompt, tokenizer)
            room = min(self._config.held_out.max_new_tokens, engine.context - len(ids))
            requests.append(
                Request(
                    prompt=ids, image_embeds=(embeds,), max_new_tokens=room, stop_tokens=stop_ids
                )
            )
        return [
            self._text(generation.ids, tokenizer, stop_ids=stop_ids)
            for generation in engine.generate(requests)
        ]

    def _load(self, projection: Params, prompts: Sequence[str | None]) -> tuple[Engine, Tokenizer]:
        from convert.projection import ProjectionInfo, write_projection

        config, model = self._config, self._preset.model
        dtype = loading.pick_dtype(config.dtype)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "projection.safetensors"
            info = ProjectionInfo(config=model, licence="", attribution="", frozen_parts={})
            write_projection(path, projection, info=info)
            params, tokenizer = loading.load_decode_params(
                config.model, dtype=dtype, layout=DECODE, projection=path
            )
        engine, self._engine = self._engine, None  # one that fails is not used again
        if engine is not None:
            engine.take_params(params)
            return engine, tokenizer
        # No larger than it must be: each place costs 0.5 MB in every slot of a 7B model.
        longest = max(len(self._prompt_ids(prompt, tokenizer)) for prompt in prompts)
        context = min(longest + config.held_out.max_new_tokens, model.llama.max_positions)
        engine = Engine(params, model, dtype=dtype, context=context, num_slots=SIDE_BY_SIDE)
        return engine, tokenizer

    def _prompt_ids(self, prompt: str | None, tokenizer: Tokenizer) -> tuple[int, ...]:
        pieces = training_pieces(self._template, prompt)
        tokens = self._preset.model.num_image_tokens
        ids = encode_prompt(self._template, pieces, tokenizer=tokenizer, num_image_tokens=tokens)
        return tuple(ids)

    def _stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        names = list(self._template.stop_tokens)
        if self._config.data.end_sym and tokenizer.is_special(self._config.data.end_sym):
            names.append(self._config.data.end_sym)
        return tuple({tokenizer.special(name) for name in names})

    def _text(self, ids: Sequence[int], tokenizer: Tokenizer, *, stop_ids: tuple[int, ...]) -> str:
        end = self._config.data.end_sym
        strings = [*self._template.stop_strings]
        if end and not tokenizer.is_special(end):
            strings.append(end)
        stream = AnswerStream(tokenizer.stream_decoder(), stop_ids, strings)
        for token in ids:
            if stream.stopped:
                break
            stream.feed(token)
        stream.finish()
        return clean_answer(self._template, stream.text)
