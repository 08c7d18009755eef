"""A folder that `python -m convert` wrote is a model everywhere that takes one: Python, `minigpt4 chat`, training.

Behind the Q-Former and without it. Not for: what is in the folder (`tests/convert/test_cli_models.py`), nor whether the
answers are the original's (`tests/parity/golden`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from convert import __main__ as convert
from convert.projection import read_projection
from minigpt4_jax import GenerationConfig, MiniGPT4, cli
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.loading import frozen_parts
from minigpt4_jax.model_folder import ModelFolder
from tests import published_files as published

MODELS = {"vicuna-7b": published.MODEL, "llama2-7b": published.WITHOUT_QFORMER}
ANSWER = {"max_new_tokens": 6, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
CONTEXT = 700
"""Tokens; the tiny tokenizer makes one of nearly every byte."""


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    text: str = request.param
    return text


@pytest.fixture(scope="module")
def model(name: str) -> ModelConfig:
    return MODELS[name]


@pytest.fixture(scope="module")
def folder(name: str, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp(name)
    files = published.write_files(here / "downloads", model=model)
    command = published.command(files, out=here / "model", model=model)
    assert convert.main([name, *command]) == 0
    return here / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own; process-wide settings are put back."""
    monkeypatch.setenv("MINIGPT4_CACHE", str(tmp_path / "cache"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for setting, value in before.items():
        jax.config.update(setting, value)
    compilation_cache.reset_cache()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(41).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_python_and_the_command_line_give_one_answer_and_it_is_about_the_picture(
    folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = MiniGPT4.load(str(folder), context=CONTEXT)
    embeds = loaded.embed_images([picture, Image.new("RGB", (9, 9), "red")])
    assert np.isfinite(embeds).all()
    assert np.abs(embeds[0] - embeds[1]).max() > 1e-3
    chat = loaded.start_chat(GenerationConfig(**ANSWER))
    chat.add_image(picture)
    answer = chat.ask("What is this?")
    options = [f"--{key.replace('_', '-')}={value}" for key, value in ANSWER.items() if "top" not in key]  # fmt: skip
    model = ["--model", str(folder), "--context", str(CONTEXT)]
    assert cli.main(["chat", str(picture), "What is this?", *model, *options]) == 0
    printed, err = capsys.readouterr()
    assert printed == answer + "\n"
    assert "Traceback" not in err


def test_a_flipped_bit_stops_the_model_from_loading(
    folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "weights" / "llama.layers.0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert cli.main(["chat", str(picture), "What is this?", "--model", str(folder)]) == 2
    finally:
        file.write_bytes(whole)
    assert "llama.layers.0.safetensors has crc32" in capsys.readouterr().err


def test_a_projection_is_trained_behind_the_folder_and_taken_by_chat(
    folder: Path, model: ModelConfig, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    data = tmp_path / "set"
    (data / "image").mkdir(parents=True)
    annotations = []
    for number, colour in enumerate(["red", "green"]):
        Image.new("RGB", (28, 28), colour).save(data / "image" / f"{number}.jpg")
        annotations.append({"image_id": number, "caption": colour})
    (data / "filter_cap.json").write_text(json.dumps(annotations))
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {folder}\nworkdir: {tmp_path / 'run'}\ndata:\n  folder: {data}\n  batch_size: 2\n"
        f"  template: {ModelFolder(folder).preset.template}\ninit_projection: random\n"
        "mesh: {data: 1, fsdp: 1, tensor: 1}\n"
        "optimizer:\n  max_steps: 1\n  warmup_steps: 0\n"
    )
    assert cli.main(["train", "--config", str(config)]) == 0
    file = tmp_path / "run" / "projection.safetensors"
    projection, info = read_projection(file, model)
    assert projection["kernel"].shape == (model.projection_in, model.llama.width)
    assert info is not None
    assert info.config == model
    assert info.frozen_parts == frozen_parts(str(folder))
    sums = ModelFolder(folder).fingerprints()
    assert info.frozen_parts == {part: sums[part] for part in sums if part != "llama_proj"}
    options = ["--model", str(folder), "--projection", str(file), "--context", str(CONTEXT)]
    greedy = ["--temperature", "0", "--max-new-tokens", "3"]
    capsys.readouterr()
    assert cli.main(["chat", str(picture), "Hi", *options, *greedy]) == 0
