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

from minigpt4_jax import MiniGPT4
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer
from tests.api.tiny import CONTEXT, Recorder
from tests.tiny_model import load_tiny, write_tiny_projection


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def projection_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_params: Any
) -> Path:
    path = tmp_path_factory.mktemp("projection") / "tiny.safetensors"
    return write_tiny_projection(path, tiny_params, config=tiny_config)


@pytest.fixture(scope="session")
def model(tiny_params: Any, tokenizer: Tokenizer, projection_file: Path) -> MiniGPT4:
    return load_tiny(tiny_params, tokenizer, projection=projection_file, context=CONTEXT)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(40)
    return [Image.fromarray(rng.integers(0, 256, (20 + 9 * i, 30, 3), np.uint8)) for i in range(3)]


@pytest.fixture
def engine(model: MiniGPT4, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(model.engine, monkeypatch)
