"""Fixtures of the command line's tests: the tiny model behind the commands, pictures, a projection, a training set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from convert.projection import ProjectionInfo, write_projection
from minigpt4_jax import Chat, GenerationConfig, MiniGPT4, cli, loading
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.training.frozen import FrozenArrays
from tests.tiny_model import make_frozen, make_loader


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all calls, as on a user's machine: the second one compiles nothing."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def tiny_weights(tiny_params: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands find random frozen parts that write printable text; process-wide settings are put back."""
    tokenizer = byte_tokenizer()
    frozen = make_frozen(tiny_params, tokenizer)
    monkeypatch.setattr(loading, "load_frozen", lambda name, **_: (dict(frozen), tokenizer))
    held = FrozenArrays(frozen, llama=PRESETS["tiny"].model.llama)
    monkeypatch.setattr(loading, "open_frozen", lambda name, **_: (held, tokenizer))
    monkeypatch.setattr(loading, "load_decode_params", make_loader(frozen, tokenizer))
    monkeypatch.setenv("MINIGPT4_CACHE", str(cache))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    cli.set_up_jax()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "a picture.png"
    pixels = np.random.default_rng(41).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def projection_file(tmp_path: Path, tiny_config: ModelConfig, tiny_params: Any) -> Path:
    path = tmp_path / "tiny.safetensors"
    projection = {name: np.asarray(leaf) for name, leaf in tiny_params["llama_proj"].items()}
    info = ProjectionInfo(config=tiny_config, licence="x", attribution="y", frozen_parts={})
    write_projection(path, projection, info=info)
    return path


@pytest.fixture
def options(projection_file: Path) -> list[str]:
    model = ["--model", "tiny", "--projection", str(projection_file), "--context", "200"]
    return [*model, "--max-new-tokens", "12", "--repetition-penalty", "3"]


@pytest.fixture
def chat(picture: Path, projection_file: Path) -> Chat:
    """The same conversation through the Python interface."""
    model = MiniGPT4.load("tiny", projection=projection_file, context=200)
    chat = model.start_chat(GenerationConfig(max_new_tokens=12, repetition_penalty=3.0))
    chat.add_image(picture)
    return chat


@pytest.fixture
def second(tmp_path: Path) -> Path:
    file = tmp_path / "another picture.png"
    Image.fromarray(np.random.default_rng(42).integers(0, 256, (31, 22, 3), np.uint8)).save(file)
    return file


@pytest.fixture
def train_config(tmp_path: Path) -> Path:
    """A YAML file and a set of four pictures."""
    folder = tmp_path / "set"
    (folder / "image").mkdir(parents=True)
    annotations = []
    for number, colour in enumerate(["red", "green", "blue", "black"]):
        Image.new("RGB", (28, 28), colour).save(folder / "image" / f"{number}.jpg")
        annotations.append({"image_id": number, "caption": colour})
    (folder / "filter_cap.json").write_text(json.dumps(annotations))
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"model: tiny\nworkdir: {tmp_path / 'run'}\ndata:\n  folder: {folder}\n  batch_size: 2\n"
        "mesh: {data: 1, fsdp: 1, tensor: 1}\n"
        "optimizer:\n  max_steps: 4\n  warmup_steps: 1\n"
    )
    return file
