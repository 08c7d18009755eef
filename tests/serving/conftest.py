"""The tiny model for a server: see `tests/tiny_model.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax import MiniGPT4
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer
from minigpt4_jax.serve_config import ServeConfig
from tests.serving.running import Running, run_server
from tests.tiny_model import load_tiny, write_tiny_projection


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: ModelConfig,
    tiny_params: Any,
    tokenizer: Tokenizer,
) -> MiniGPT4:
    """The tiny model with 4 slots. Its answers are text that never ends by itself."""
    path: Path = tmp_path_factory.mktemp("projection") / "tiny.safetensors"
    write_tiny_projection(path, tiny_params, config=tiny_config)
    return load_tiny(tiny_params, tokenizer, projection=path, context=200, num_slots=4)


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(41)
    return [Image.fromarray(rng.integers(0, 256, (20 + 9 * i, 30, 3), np.uint8)) for i in range(3)]


@pytest.fixture(scope="session")
def make_model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: ModelConfig,
    tiny_params: Any,
) -> Callable[..., MiniGPT4]:
    """Another tiny model: a server takes its model for itself."""
    path: Path = tmp_path_factory.mktemp("projection") / "tiny.safetensors"
    write_tiny_projection(path, tiny_params, config=tiny_config)
    named = byte_tokenizer()
    # The model has more rows than there are bytes; a drawn answer may have any of them.
    left = range(named.vocab_size, tiny_config.llama.vocab_size)
    named._backend.add_tokens([chr(0xE000 + number) for number in left])
    return lambda **settings: load_tiny(
        tiny_params, named, projection=path, **{"context": 128, "num_slots": 4, **settings}
    )


@pytest.fixture(scope="session")
def tiny_server(make_model: Callable[..., MiniGPT4]) -> Iterator[Running]:
    """The tiny model behind a real uvicorn, for all tests that leave it as it was."""
    config = ServeConfig(model="tiny", port=0, context=128, num_slots=4)
    with run_server(make_model(), config) as running:
        yield running
