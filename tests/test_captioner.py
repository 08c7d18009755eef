"""minigpt4_jax.captioner: answers of the projection that is handed in, as the finished model would give them."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from convert.projection import ProjectionInfo, write_projection
from minigpt4_jax import GenerationConfig, MiniGPT4, loading
from minigpt4_jax.captioner import Captioner
from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.config_file import load
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.train_config import TrainConfig
from tests.tiny_model import make_frozen, make_loader

TOKENS = 12


@pytest.fixture
def loads(tiny_params: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded to answer with."""
    tokenizer, names = byte_tokenizer(), []
    real: Callable[..., Any] = make_loader(make_frozen(tiny_params, tokenizer), tokenizer)

    def load_it(name: str, **settings: Any) -> Any:
        names.append(name)
        return real(name, **settings)

    monkeypatch.setattr(loading, "load_decode_params", load_it)
    return names


def make_captioner(*overrides: str) -> Captioner:
    settings = ["model=tiny", f"held_out.max_new_tokens={TOKENS}", *overrides]
    return Captioner(load(TrainConfig, None, settings))


def make_picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [make_picture(seed) for seed in range(3)]
PROMPTS = ["What is this?", "Say it.", "And this, at more length?"]


def test_answers_are_those_of_the_model_with_the_projection_of_the_moment(
    tmp_path: Path, tiny_params: Any, tiny_config: ModelConfig, loads: list[str]
) -> None:
    start = jax.tree.map(np.asarray, tiny_params["llama_proj"])
    flipped = jax.tree.map(lambda leaf: leaf[..., ::-1].copy(), start)
    captioner = make_captioner()
    found = [captioner(projection, PICTURES, PROMPTS) for projection in (start, flipped, start)]
    assert loads == ["tiny"] * 3
    assert found[0] == found[2] != found[1]
    generation = GenerationConfig(max_new_tokens=TOKENS)
    file = tmp_path / "projection.safetensors"
    info = ProjectionInfo(config=tiny_config, licence="", attribution="", frozen_parts={})
    write_projection(file, flipped, info=info)
    model = MiniGPT4.load("tiny", projection=file, context=200)
    assert found[1] == model.generate(PICTURES, PROMPTS, generation=generation)
    assert any(found[0])


def test_a_bare_picture_can_be_asked_about(tiny_params: Any, loads: list[str]) -> None:
    projection = jax.tree.map(np.asarray, tiny_params["llama_proj"])
    (bare, asked) = make_captioner()(projection, PICTURES[:1] * 2, [None, "What is this?"])
    assert bare != asked


def test_an_answer_ends_at_the_end_symbol_that_the_run_trains_with(
    tiny_params: Any, loads: list[str]
) -> None:
    projection = jax.tree.map(np.asarray, tiny_params["llama_proj"])
    (whole,) = make_captioner()(projection, PICTURES[:1], PROMPTS[:1])
    middle = whole[len(whole) // 2]
    # YAML would read some characters as more than text.
    (cut,) = make_captioner(f"data.end_sym='{middle}'")(projection, PICTURES[:1], PROMPTS[:1])
    assert cut == whole[: whole.index(middle)].strip()


def test_nothing_of_the_copy_is_left_on_the_device(tiny_params: Any, loads: list[str]) -> None:
    projection = jax.tree.map(np.asarray, tiny_params["llama_proj"])
    captioner = make_captioner()
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_params["llama"]["layers"]))
    gc.disable()  # a step would not wait for it
    try:
        captioner(projection, PICTURES[:1], PROMPTS[:1])
        left = sum(leaf.nbytes for leaf in jax.live_arrays()) - before
    finally:
        gc.enable()
    assert left < copy / 2


def test_a_projection_of_another_shape_is_refused(tiny_params: Any, loads: list[str]) -> None:
    projection = jax.tree.map(np.asarray, tiny_params["llama_proj"])
    with pytest.raises(UserError, match="bias"):
        make_captioner()({**projection, "bias": projection["bias"][1:]}, PICTURES[:1], PROMPTS[:1])
