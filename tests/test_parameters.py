"""parameters.py counts what the models have, and what a device holds by the table in sharding.py, for every preset.

With two or three layers each: building the trees of all of them at full depth takes half a minute. Full numbers that
the published models are known by are in test_estimate.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.parameters import count_parameters
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.sharding import AXES, make_shardings
from tests.signature_checks import without_signature_checks

MESHES = ((1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2))


def shallow(model: ModelConfig) -> ModelConfig:
    return replace(
        model, vit=replace(model.vit, num_layers=2), llama=replace(model.llama, num_layers=3)
    )


MODELS = {name: shallow(preset.model) for name, preset in PRESETS.items()}


@pytest.fixture(scope="module")
def trees() -> dict[str, Any]:
    with without_signature_checks():
        return {name: abstract_params(model) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_every_part_has_as_many_numbers_as_its_tree(name: str, trees: dict[str, Any]) -> None:
    found = {part: count.total for part, count in count_parameters(MODELS[name]).items()}
    expected = {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for part, tree in trees[name].items()
    }
    assert found == expected


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", ["tiny-qformer", "vicuna-7b", "vicuna-13b", "llama2-7b"])
def test_a_device_holds_what_the_table_of_shardings_gives_it(
    name: str, sizes: tuple[int, int, int], trees: dict[str, Any]
) -> None:
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    counts = count_parameters(MODELS[name])
    for part, tree in trees[name].items():
        shardings = make_shardings(mesh, {part: tree})
        shapes = jax.tree.map(
            lambda leaf, place: math.prod(place.shard_shape(leaf.shape)), {part: tree}, shardings
        )
        expected = sum(jax.tree.leaves(shapes))
        assert counts[part].on_device(dict(zip(AXES, sizes, strict=True))) == expected, part
