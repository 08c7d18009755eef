"""The tiny model through minigpt4_jax.api, and an engine that notes what it is asked.

The weights are random, with one change: only printable ASCII bytes have an embedding, so every answer is text that
never ends by itself. Where an answer must end, the engine's ids are scripted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convert.projection import ProjectionInfo, write_projection
from minigpt4_jax import MiniGPT4, loading
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer
from tests.api.tiny import CONTEXT, Recorder
from tests.tiny_model import make_frozen, make_loader


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def projection_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_params: Any
) -> Path:
    path = tmp_path_factory.mktemp("projection") / "tiny.safetensors"
    projection = {name: np.asarray(leaf) for name, leaf in tiny_params["llama_proj"].items()}
    info = ProjectionInfo(config=tiny_config, licence="x", attribution="y", frozen_parts={})
    write_projection(path, projection, info=info)
    return path


@pytest.fixture(scope="session")
def model(tiny_params: Any, tokenizer: Tokenizer, projection_file: Path) -> MiniGPT4:
    with pytest.MonkeyPatch.context() as patch:
        frozen = make_frozen(tiny_params, tokenizer)
        patch.setattr(loading, "load_decode_params", make_loader(frozen, tokenizer))
        return MiniGPT4.load("tiny", projection=projection_file, context=CONTEXT)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(40)
    return [Image.fromarray(rng.integers(0, 256, (20 + 9 * i, 30, 3), np.uint8)) for i in range(3)]


@pytest.fixture
def engine(model: MiniGPT4, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(model.engine, monkeypatch)
