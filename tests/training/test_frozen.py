"""training/frozen.py and its form over a folder: the same weights from both, and nothing read that nobody holds."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.loading import FrozenFolder
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.models.layout import DISK, TRAIN
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.sharding import make_mesh, make_shardings, replicated
from minigpt4_jax.training.frozen import FrozenArrays, FrozenWeights
from minigpt4_jax.weight_files import WeightFile
from tests.tiny_folder import write_folder

PRESET = PRESETS["tiny-qformer"]


@pytest.fixture(scope="module")
def params(draw_params: Callable[[Any], Any]) -> Any:
    return draw_params(abstract_params(PRESET.model))


@pytest.fixture(scope="module")
def folder(params: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    path = write_folder(tmp_path_factory.mktemp("model") / "a", params, preset=PRESET)
    return ModelFolder(path)


@pytest.fixture(scope="module")
def sources(params: Any, folder: ModelFolder) -> dict[str, FrozenWeights]:
    frozen = {part: tree for part, tree in params.items() if part != "llama_proj"}
    held = FrozenArrays(frozen, llama=PRESET.model.llama)
    return {"arrays": held, "folder": FrozenFolder(folder)}


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_folder_gives_what_arrays_give(sources: dict[str, FrozenWeights]) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    first = SingleDeviceSharding(jax.devices()[0])
    for parts, layout, dtype, place in (
        (("llama",), TRAIN, jnp.bfloat16, functools.partial(make_shardings, mesh)),
        (PRESET.model.vision_parts, DISK, jnp.float32, lambda _: replicated(mesh)),
        (PRESET.model.vision_parts, DISK, jnp.bfloat16, lambda _: first),
    ):
        loaded = [s.load(parts, layout=layout, dtype=dtype, place=place) for s in sources.values()]
        assert set(loaded[0]) == set(parts)
        assert_same(*loaded)
    name = "llama/embed_tokens/embedding"
    left, right = (source.read(name) for source in sources.values())
    assert left.tobytes() == right.tobytes()


def test_every_frozen_part_has_a_fingerprint_that_follows_its_numbers(
    params: Any, folder: ModelFolder, sources: dict[str, FrozenWeights], tmp_path: Path
) -> None:
    parts = set(abstract_params(PRESET.model)) - {"llama_proj"}
    bumped = jax.tree.map(np.array, params)
    bumped["qformer"]["layer"]["1"]["mlp"]["fc1"]["bias"][3] += 1e-3
    other = FrozenFolder(ModelFolder(write_folder(tmp_path / "b", bumped, preset=PRESET)))
    again = FrozenFolder(ModelFolder(write_folder(tmp_path / "c", params, preset=PRESET)))
    bumped.pop("llama_proj")
    arrays = FrozenArrays(bumped, llama=PRESET.model.llama)
    for mine, changed in ((sources["arrays"], arrays), (sources["folder"], other)):
        before, after = mine.fingerprints(), changed.fingerprints()
        assert set(before) == set(after) == parts
        assert {part for part in parts if before[part] != after[part]} == {"qformer"}
    assert again.fingerprints() == sources["folder"].fingerprints()


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 4, "tensor": 2}], ids=str)
def test_every_part_of_a_weight_is_read_once_by_the_host_whose_devices_hold_it(
    sizes: dict[str, int],
    sources: dict[str, FrozenWeights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    real = WeightFile.read

    def counted(self: WeightFile, name: str, index: Any = ()) -> Any:
        found = real(self, name, index)
        read[name] += found.nbytes
        largest[name] = max(largest[name], found.nbytes)
        return found

    monkeypatch.setattr(WeightFile, "read", counted)
    mesh = make_mesh(**sizes)
    loaded = sources["folder"].load(
        ("llama",),
        layout=TRAIN,
        dtype=jnp.float32,
        place=functools.partial(make_shardings, mesh),
    )
    assert all(name.startswith("llama/") for name in read)
    for path, leaf in leaf_names(loaded).items():
        layers = PRESET.model.llama.num_layers if "/layers/" in path else 1
        piece = math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for layer in range(layers):
            name = path.replace("/layers/", f"/layers/{layer}/")
            assert read[name] == leaf.nbytes // layers, path
            assert largest[name] == piece // layers, path
