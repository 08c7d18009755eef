"""Every parameter has one place on the mesh, and nothing falls through to a row for the rest."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import UserError
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.sharding import AXES, RULES, make_mesh, make_shardings, match_rule

LAYOUTS = {"stacked": TRAIN, "decode": DECODE, "int8": DECODE_INT8}


def trees() -> dict[str, Any]:
    """Every preset in every layout."""
    found = {}
    for name, preset in PRESETS.items():
        tree = abstract_params(preset.model)
        found[f"{name}, per layer"] = tree
        for kind, layout in LAYOUTS.items():
            found[f"{name}, {kind}"] = jax.eval_shape(
                lambda t, layout=layout, llama=preset.model.llama: convert_layout(
                    t, DISK, layout, llama=llama
                ),
                tree,
            )
    return found


TREES = trees()


@pytest.mark.parametrize("name", TREES)
def test_every_parameter_is_met_by_one_row(name: str) -> None:
    for path in leaf_names(TREES[name]):
        assert len(match_rule(path)) == 1, path


def test_every_row_meets_a_parameter_of_some_preset() -> None:
    met = {
        rule for tree in TREES.values() for path in leaf_names(tree) for rule in match_rule(path)
    }
    assert met == set(RULES)


@pytest.mark.parametrize("name", TREES)
def test_specs_name_no_more_axes_than_the_parameter_has(name: str) -> None:
    tree = TREES[name]
    shardings = leaf_names(make_shardings(make_mesh(data=4), tree))
    for path, leaf in leaf_names(tree).items():
        assert len(shardings[path].spec) <= len(leaf.shape), path


@pytest.mark.parametrize("name", [n for n in TREES if not n.startswith("tiny")])
def test_most_of_a_model_is_split_and_what_is_not_is_small(name: str) -> None:
    """On eight abstract devices of a tensor-parallel mesh and of an fsdp one."""
    for axis in ("tensor", "fsdp"):
        sizes = dict.fromkeys(AXES, 1) | {axis: 8}
        if name.startswith("smol") and axis == "tensor":
            sizes[axis] = 3  # heads: 9 and 3
        mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
        tree = TREES[name]
        shardings = leaf_names(make_shardings(mesh, tree))
        whole = sum(leaf.size for leaf in leaf_names(tree).values())
        local = sum(
            int(np.prod(shardings[path].shard_shape(leaf.shape)))
            for path, leaf in leaf_names(tree).items()
        )
        assert local < whole * (1 / sizes[axis] + 0.04), (axis, local / whole)


def test_layers_of_a_stack_lie_where_single_ones_do() -> None:
    mesh = make_mesh(fsdp=2, tensor=2)
    per_layer, stacked = (
        leaf_names(make_shardings(mesh, TREES[f"tiny, {kind}"]))
        for kind in ("per layer", "stacked")
    )
    kernel = "self_attn/q_proj/kernel"
    assert per_layer[f"llama/layers/1/{kernel}"].spec == P("fsdp", "tensor")
    assert stacked[f"llama/layers/{kernel}"].spec == P(None, "fsdp", "tensor")
    assert stacked["llama/norm/scale"].spec == P()


def test_a_parameter_without_a_row_is_an_error() -> None:
    tree = {"llama": {"layers": {"0": {"gate": {"kernel": np.ones((2, 2))}}}}}
    with pytest.raises(ValueError, match="llama/layers/0/gate/kernel"):
        make_shardings(make_mesh(data=4), tree)


def test_sizes_that_the_mesh_does_not_divide_are_all_listed() -> None:
    tree = {
        "ln_vision": {"scale": np.ones(3), "bias": np.ones(3)},
        "llama": {
            "lm_head": {"kernel": np.ones((6, 5))},
            "embed_tokens": {"embedding": np.ones((4, 6))},
        },
    }
    with pytest.raises(UserError) as caught:
        make_shardings(make_mesh(fsdp=2, tensor=2), tree)
    assert "llama/lm_head/kernel [6, 5]" in str(caught.value)
    assert "llama/embed_tokens/embedding [4, 6]" in str(caught.value)


def test_a_mesh_of_another_number_of_devices_is_refused() -> None:
    with pytest.raises(UserError, match=r"data=3 x fsdp=1 x tensor=1, 3 devices; expected 4"):
        make_mesh(data=3)
