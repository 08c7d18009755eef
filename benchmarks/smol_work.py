"""The smol model and 64 real questions about pictures: what `inference_cpu.py` asks both sides.

For: the one place where a benchmark of inference reads weights, pictures and text. Not for: a GPU host, which may lack
what is imported here; and not for measuring how good the answers are (`smol_heldout.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from inference_cpu import Work
from PIL import Image

from convert.projection import read_projection
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.loading import load_frozen, shipped_projection
from minigpt4_jax.presets import get_preset

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = ("coffee.jpg", "flower.jpg")
QUESTIONS = (
    "What is this?",
    "Describe this picture.",
    "What colour is it?",
    "Write a two-line poem about it.",
    "Where would you find it?",
    "What is it made of?",
    "Name one thing that goes well with it.",
    "Tell me a short story about this picture.",
)
COUNT = 64
CONTEXT = 1024
MAX_NEW_TOKENS = 64
TEXT = (
    "The lighthouse stood at the end of the pier, white against the grey of the sea. Every evening at half past six an "
    "old man climbed its steps, lit the lamp, and wrote the weather into a book: wind from the north-west, waves of "
    "two metres, visibility good. In all those years he had never missed an evening, and the captains knew it. "
) * 12


def load_work() -> Work:
    """Fetches the smol parts on the first call, as `minigpt4 chat` does."""
    preset = get_preset("smol")
    frozen, tokenizer = load_frozen("smol")
    projection, _ = read_projection(shipped_projection("smol"), preset.model)

    def ids(question: str) -> list[int]:
        chat = new_chat()
        chat.add_image(None)
        return chat.ask(question)

    def new_chat() -> Conversation[Any]:
        return Conversation(
            get_template(preset.template),
            tokenizer,
            num_image_tokens=preset.model.num_image_tokens,
            context=CONTEXT,
        )

    return Work(
        config=preset.model,
        params={**frozen, "llama_proj": projection},
        images=np.stack(
            [
                preprocess(
                    crop,
                    size=preset.model.vit.image_size,
                    mean=preset.image_mean,
                    std=preset.image_std,
                )
                for crop in crops()
            ]
        ),
        prompts=[ids(QUESTIONS[number // 2 % len(QUESTIONS)]) for number in range(COUNT)],
        text=tokenizer.encode(TEXT),
        stop_tokens=new_chat().stop_ids,
        max_new_tokens=MAX_NEW_TOKENS,
        context=CONTEXT,
        said=f"{COUNT} square crops of {' and '.join(PICTURES)}, {len(QUESTIONS)} questions in turn",
    )


def crops() -> list[Image.Image]:
    """`COUNT` squares out of the example pictures, from the whole height down to half of it; always the same ones."""
    pictures = [load_image(EXAMPLES / name) for name in PICTURES]
    rng = np.random.default_rng(0)
    found = []
    for number in range(COUNT):
        picture = pictures[number % len(pictures)]
        side = int(min(picture.size) * rng.uniform(0.5, 1))
        left = int(rng.integers(0, picture.width - side + 1))
        top = int(rng.integers(0, picture.height - side + 1))
        found.append(picture.crop((left, top, left + side, top + side)))
    return found
