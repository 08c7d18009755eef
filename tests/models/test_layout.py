"""models/layout.py: the three layouts hold the same bits, give the same logits, and are never mistaken in silence."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.checkpoint import compare_trees
from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.models.layout import DECODE, DISK, TRAIN, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import Batch, abstract_params, forward, make_model
from minigpt4_jax.presets import PRESETS

LAYOUTS = {
    "disk": DISK,
    "train": TRAIN,
    "decode": DECODE,
    "stacked and fused": Layout(stacked=True, fused=True),
}
PAIRS = list(itertools.permutations(LAYOUTS, 2))


@pytest.fixture(scope="module")
def disk_params(any_params: Any) -> Any:
    """In NumPy, where moving leaves around compiles nothing."""
    return jax.tree.map(np.asarray, any_params)


def assert_identical(actual: Any, expected: Any) -> None:
    assert compare_trees(actual, expected) == []
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def convert(params: Any, source: str, target: str, config: ModelConfig) -> Any:
    return convert_layout(params, LAYOUTS[source], LAYOUTS[target], llama=config.llama)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_there_and_back_is_bit_identical(
    source: str, target: str, disk_params: Any, any_config: ModelConfig
) -> None:
    start = convert(disk_params, "disk", source, any_config)
    there = convert(start, source, target, any_config)
    assert_identical(convert(there, target, source, any_config), start)
    assert_identical(convert(there, target, "disk", any_config), disk_params)


@pytest.mark.parametrize("target", ["train", "decode", "stacked and fused"])
def test_numpy_stays_numpy_and_a_narrow_dtype_stays_narrow(
    target: str, disk_params: Any, any_config: ModelConfig
) -> None:
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), disk_params)
    there = convert(narrow, "disk", target, any_config)
    assert {type(leaf) for leaf in jax.tree.leaves(there)} == {np.ndarray}
    assert {leaf.dtype for leaf in jax.tree.leaves(there)} == {np.dtype(jnp.bfloat16)}
    assert_identical(convert(there, target, "disk", any_config), narrow)


def test_the_tree_that_is_passed_in_is_left_as_it_is(
    disk_params: Any, any_config: ModelConfig
) -> None:
    before = jax.tree.map(lambda leaf: leaf, disk_params)  # new dicts, the same arrays
    for target in ("train", "decode"):
        convert(disk_params, "disk", target, any_config)
    assert jax.tree.structure(disk_params) == jax.tree.structure(before)


def test_stacks_and_fusions_have_the_shapes_the_modules_ask_for(
    disk_params: Any, any_config: ModelConfig
) -> None:
    llama, vit = any_config.llama, any_config.vit
    stacked = convert(disk_params, "disk", "train", any_config)
    queries, keys = llama.num_heads * llama.head_dim, llama.num_kv_heads * llama.head_dim
    q = stacked["llama"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.shape == (llama.num_layers, llama.width, queries)
    assert stacked["vit"]["blocks"]["mlp"]["fc1"]["bias"].shape == (vit.num_layers, vit.mlp_width)
    layer = convert(disk_params, "disk", "decode", any_config)["llama"]["layers"]["1"]
    assert set(layer["self_attn"]) == {"qkv_proj", "o_proj"}
    assert layer["self_attn"]["qkv_proj"]["kernel"].shape == (llama.width, queries + 2 * keys)
    assert set(layer["mlp"]) == {"gate_up_proj", "down_proj"}


def test_a_part_of_a_tree_converts_like_the_whole(
    disk_params: Any, any_config: ModelConfig
) -> None:
    whole = convert(disk_params, "disk", "decode", any_config)
    part = convert({"llama": disk_params["llama"]}, "disk", "decode", any_config)
    assert_identical(part["llama"], whole["llama"])
    assert_identical(convert(disk_params["llama"], "disk", "decode", any_config), whole["llama"])


def test_all_layouts_give_equal_logits_and_hidden_states(
    any_params: Any, any_config: ModelConfig
) -> None:
    rng = np.random.default_rng(4)
    size, slots = any_config.vit.image_size, any_config.num_image_tokens
    token_ids = rng.integers(0, any_config.llama.vocab_size, (2, slots + 9)).astype(np.int32)
    token_ids[:, 3 : 3 + slots] = IMAGE_TOKEN_ID
    batch = Batch(
        token_ids=jnp.asarray(token_ids),
        attention_mask=jnp.ones(token_ids.shape, bool),
        images=jnp.asarray(rng.normal(size=(2, 1, size, size, 3)), jnp.float32),
    )
    names = ("vit.blocks", "llama.layers")
    outputs = {}
    for name, layout in LAYOUTS.items():
        model = make_model(any_config, layout=layout, dtype=jnp.float32)
        params = convert(any_params, "disk", name, any_config)
        outputs[name] = jax.jit(partial(forward, model=model, capture=names))(params, batch)
    reference = outputs.pop("disk")
    assert float(jnp.std(reference.logits)) > 1  # logits of a model that does something
    for output in outputs.values():
        # Fused and scanned matmuls may add up in another order: a few float32 roundings on values of about 5.
        np.testing.assert_allclose(output.logits, reference.logits, rtol=0, atol=2e-5)
        for name in names:
            np.testing.assert_allclose(
                output.hidden[name], reference.hidden[name], rtol=0, atol=2e-5
            )


@pytest.mark.parametrize(("actual", "claimed"), PAIRS)
def test_a_tree_in_another_layout_than_claimed_is_refused(
    actual: str, claimed: str, disk_params: Any, any_config: ModelConfig
) -> None:
    params = convert(disk_params, "disk", actual, any_config)
    for target in LAYOUTS:
        with pytest.raises(ValueError, match=r"expected .*Layout\(stacked="):
            convert(params, claimed, target, any_config)


def test_a_missing_layer_is_named(disk_params: Any, any_config: ModelConfig) -> None:
    layer = disk_params["llama"]["layers"]["0"]
    llama = {**disk_params["llama"], "layers": {"0": layer, "2": layer}}
    with pytest.raises(ValueError, match=r"Layers are named \['0', '2'\]; expected 0 to 1"):
        convert({"llama": llama}, "disk", "train", any_config)


def test_fused_kernels_of_another_model_are_refused(
    disk_params: Any, any_config: ModelConfig
) -> None:
    fused = convert(disk_params, "disk", "decode", any_config)
    layer = fused["llama"]["layers"]["0"]["self_attn"]["qkv_proj"]
    layer["kernel"] = layer["kernel"][:, 1:]
    with pytest.raises(ValueError, match="qkv_proj has 63 columns; expected 64"):
        convert(fused, "decode", "disk", any_config)


@pytest.mark.parametrize("target", ["train", "decode", "stacked and fused"])
def test_the_layers_of_the_qformer_differ_and_are_never_stacked_nor_fused(
    target: str, draw_params: Any
) -> None:
    config = PRESETS["tiny-qformer"].model
    params = jax.tree.map(np.asarray, draw_params(abstract_params(config)))
    there = convert(params, "disk", target, config)
    for part in ("query_tokens", "qformer"):
        assert_identical({part: there[part]}, {part: params[part]})
