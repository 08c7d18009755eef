"""A folder of twelve pictures with captions, and a tiny run over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from minigpt4_jax.config_file import load
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.captions import Caption
from minigpt4_jax.training.frozen import FrozenArrays
from minigpt4_jax.training.loop import train
from minigpt4_jax.training.state import Projection

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
SHAPES = {
    "full": (0, 28, 0, 28),
    "left": (0, 28, 0, 14),
    "top": (0, 14, 0, 28),
    "dot": (9, 19, 9, 19),
}


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve 28-pixel pictures in the `cc_sbu_align` format: a colour and a shape on white, named by both."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "image").mkdir()
    annotations = []
    for colour, rgb in COLOURS.items():
        for shape, (top, bottom, left, right) in SHAPES.items():
            pixels = np.full((28, 28, 3), 255, np.uint8)
            pixels[top:bottom, left:right] = rgb
            name = f"{colour}-{shape}"
            Image.fromarray(pixels).save(folder / "image" / f"{name}.jpg", quality=95)
            annotations.append({"image_id": name, "caption": f"{colour} {shape}"})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return folder


@pytest.fixture(scope="session")
def frozen(tiny_params: dict[str, Any]) -> dict[str, Any]:
    """The frozen parts alone, as the entry point hands them in."""
    return {name: part for name, part in tiny_params.items() if name != "llama_proj"}


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all runs: the tower is frozen."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every run compiles the same programs; kept on disk, as the command line does, they are compiled once."""
    folder = tmp_path_factory.mktemp("xla")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def make_config(data_folder: Path, feature_cache: Path) -> MakeConfig:
    """`make_config(workdir, "key=value", ...)`: ten steps of four samples, a checkpoint every four."""

    def make(workdir: Path, *overrides: str) -> TrainConfig:
        return load(
            TrainConfig, None, [*base_overrides(workdir, data_folder, feature_cache), *overrides]
        )

    return make


ONE_DEVICE = ("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")
"""Of the eight that tests see."""


def base_overrides(workdir: Path, data_folder: Path, feature_cache: Path) -> list[str]:
    return [
        "model=tiny", f"workdir={workdir}", f"data.folder={data_folder}", f"feature_cache={feature_cache}",
        "data.batch_size=4", "data.length_multiple=16", "data.prompts=['What is this?', 'Say it.']",
        "optimizer.max_steps=10", "optimizer.warmup_steps=2", "optimizer.init_lr=0.01",
        "save_every=4", "log_every=5", "init_projection=random", *ONE_DEVICE,
    ]  # fmt: skip


def hold(params: dict[str, Any]) -> FrozenArrays:
    """The frozen weights of a tiny model, as `train` takes them."""
    return FrozenArrays(params, llama=PRESETS["tiny"].model.llama)


class Runner:
    """Runs `train` and keeps what it handed to `save_projection`."""

    def __init__(self, frozen: dict[str, Any], make_config: MakeConfig) -> None:
        self._frozen, self._make_config = frozen, make_config
        self.saved: dict[Path, Projection] = {}

    def __call__(
        self,
        workdir: Path,
        *overrides: str,
        start: Projection | None = None,
        frozen: dict[str, Any] | None = None,
        caption: Caption | None = None,
    ) -> Projection:
        return train(
            self._make_config(workdir, *overrides),
            frozen=hold(frozen or self._frozen),
            tokenizer=byte_tokenizer(),
            start=start,
            save_projection=self.saved.__setitem__,
            caption=caption,
        )


@pytest.fixture
def run(frozen: dict[str, Any], make_config: MakeConfig) -> Runner:
    return Runner(frozen, make_config)
