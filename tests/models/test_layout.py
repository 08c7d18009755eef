"""models/layout.py: the layouts of floats hold the same bits, give the same logits, and none is mistaken in silence.

Of int8: what is rounded, how, by how much at most, and that the modules multiply with just that.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.checkpoint import compare_trees
from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.models.layout import (
    DECODE,
    DECODE_INT8,
    DISK,
    TRAIN,
    Layout,
    convert_layout,
)
from minigpt4_jax.models.minigpt4 import Batch, abstract_params, forward, make_model
from minigpt4_jax.presets import PRESETS

LAYOUTS = {
    "disk": DISK,
    "train": TRAIN,
    "decode": DECODE,
    "stacked and fused": Layout(stacked=True, fused=True, int8=False),
    "two shards": dataclasses.replace(DECODE, shards=2),
    "int8": DECODE_INT8,
}
FLOATS = [name for name in LAYOUTS if name != "int8"]
PAIRS = [
    pair
    for pair in itertools.permutations(LAYOUTS, 2)
    if set(pair) != {"decode", "two shards"}  # the same names and shapes
]


MULTIPLIED = ("self_attn/qkv_proj", "self_attn/o_proj", "mlp/gate_up_proj", "mlp/down_proj")


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


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FLOATS, 2)))
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


def test_every_shard_of_a_fused_kernel_has_its_heads_of_q_k_and_v(
    disk_params: Any, any_config: ModelConfig
) -> None:
    before = disk_params["llama"]["layers"]["1"]
    after = convert(disk_params, "disk", "two shards", any_config)["llama"]["layers"]["1"]
    for part, joint, names in (
        ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    ):
        halves = [np.split(before[part][name]["kernel"], 2, axis=1) for name in names]
        expected = [half[t] for t in (0, 1) for half in halves]
        np.testing.assert_array_equal(
            after[part][joint]["kernel"], np.concatenate(expected, axis=1)
        )


def test_columns_that_the_shards_do_not_divide_are_refused(
    disk_params: Any, any_config: ModelConfig
) -> None:
    with pytest.raises(ValueError, match="32 columns cannot be cut into 3 shards"):
        convert_layout(
            disk_params, DISK, dataclasses.replace(DECODE, shards=3), llama=any_config.llama
        )
    with pytest.raises(ValueError, match=r"shards is 2 in .*expected 1, or more where fused"):
        dataclasses.replace(DISK, shards=2)


def test_a_part_of_a_tree_converts_like_the_whole(
    disk_params: Any, any_config: ModelConfig
) -> None:
    whole = convert(disk_params, "disk", "decode", any_config)
    part = convert({"llama": disk_params["llama"]}, "disk", "decode", any_config)
    assert_identical(part["llama"], whole["llama"])
    assert_identical(convert(disk_params["llama"], "disk", "decode", any_config), whole["llama"])


def test_all_layouts_of_floats_give_equal_logits_and_hidden_states(
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
    for name in FLOATS:
        model = make_model(any_config, layout=LAYOUTS[name], dtype=jnp.float32)
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


# --- int8 ---


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def dequantised(module: Any, leaf: str) -> np.ndarray:
    scale = np.asarray(module[f"{leaf}_scale"])
    return np.asarray(module[leaf], np.float32) * (scale if leaf == "kernel" else scale[:, None])


def with_dequantised_values(int8_params: Any, floats: Any) -> Any:
    """The `DECODE` tree `floats` with what the int8 tree stands for in the places that it rounded."""
    if not isinstance(floats, dict):
        return floats
    return {
        name: dequantised(int8_params, name)
        if f"{name}_scale" in int8_params
        else with_dequantised_values(int8_params[name], sub)
        for name, sub in floats.items()
    }


def untied(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
    llama = dataclasses.replace(config.llama, tie_embeddings=False)
    kernel = np.random.default_rng(5).normal(size=(llama.width, llama.vocab_size))
    head = {"kernel": kernel.astype(np.float32) / llama.width**0.5}
    tree = {**params, "llama": {**params["llama"], "lm_head": head}}
    return tree, dataclasses.replace(config, llama=llama)


def test_int8_rounds_what_the_llm_multiplies_with_and_nothing_else(
    disk_params: Any, any_config: ModelConfig
) -> None:
    trees = [(disk_params, any_config), untied(disk_params, any_config)]
    heads = ("llama/embed_tokens/embedding", "llama/lm_head/kernel")
    for (params, config), head in zip(trees, heads, strict=True):
        floats = flat(convert(params, "disk", "decode", config))
        int8 = flat(convert(params, "disk", "int8", config))
        rounded = {head} | {
            f"llama/layers/{i}/{name}/kernel"
            for i in range(config.llama.num_layers)
            for name in MULTIPLIED
        }
        assert set(int8) == set(floats) | {f"{name}_scale" for name in rounded}
        for name, leaf in floats.items():
            if name not in rounded:
                assert int8[name].dtype == leaf.dtype, name
                assert int8[name].tobytes() == leaf.tobytes(), name
                continue
            axis = 1 if name == heads[0] else 0
            scale = np.expand_dims(int8[f"{name}_scale"], axis)
            assert (int8[name].dtype, scale.dtype) == (np.int8, np.float32)
            error = np.abs(int8[name] * scale - leaf)
            assert (error <= scale * (0.5 + 1e-4)).all(), name
            assert (np.abs(int8[name]).max(axis) == 127).all(), name


def test_int8_of_any_part_is_int8_of_the_whole_in_numpy_as_in_jax(
    disk_params: Any, any_config: ModelConfig
) -> None:
    params, config = untied(disk_params, any_config)
    whole = convert(params, "disk", "int8", config)["llama"]
    disk = params["llama"]
    layer = disk["layers"]["1"]
    for part, expected in (
        ({"layers": {"1": layer}}, {"layers": {"1": whole["layers"]["1"]}}),
        (
            {"layers": {"1": {"mlp": layer["mlp"]}}},
            {"layers": {"1": {"mlp": whole["layers"]["1"]["mlp"]}}},
        ),
        ({"lm_head": disk["lm_head"]}, {"lm_head": whole["lm_head"]}),
        ({"norm": disk["norm"]}, {"norm": whole["norm"]}),
    ):
        assert_identical(convert({"llama": part}, "disk", "int8", config), {"llama": expected})
        on_device = convert({"llama": jax.tree.map(jnp.asarray, part)}, "disk", "int8", config)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
        assert_identical(on_device, {"llama": expected})
    traced = jax.jit(lambda part: convert({"llama": part}, "disk", "int8", config))
    assert_identical(
        traced({"layers": {"1": layer}})["llama"], {"layers": {"1": whole["layers"]["1"]}}
    )
    assert_identical(
        convert({"llama": {"embed_tokens": disk["embed_tokens"]}}, "disk", "int8", any_config),
        {
            "llama": {
                "embed_tokens": convert(disk_params, "disk", "int8", any_config)["llama"][
                    "embed_tokens"
                ]
            }
        },
    )


def test_the_int8_model_multiplies_with_just_those_values(
    disk_params: Any, any_config: ModelConfig
) -> None:
    token_ids = np.random.default_rng(4).integers(0, any_config.llama.vocab_size, (2, 9))
    size = any_config.vit.image_size
    batch = Batch(
        token_ids=jnp.asarray(token_ids, jnp.int32),
        attention_mask=jnp.ones(token_ids.shape, bool),
        images=jnp.zeros((2, 1, size, size, 3)),
    )
    for params, config in ((disk_params, any_config), untied(disk_params, any_config)):
        int8 = convert(params, "disk", "int8", config)
        floats = with_dequantised_values(int8, convert(params, "disk", "decode", config))
        model = make_model(config, layout=DECODE_INT8, dtype=jnp.float32)
        asked = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), batch)["params"])
        assert compare_trees(int8, asked) == []
        found = jax.jit(partial(forward, model=model))(int8, batch).logits
        plain = make_model(config, layout=DECODE, dtype=jnp.float32)
        expected = jax.jit(partial(forward, model=plain))(floats, batch).logits
        # The scale before or after the sum: a few float32 roundings on values of about 5.
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("target", FLOATS)
def test_there_is_no_way_back_from_int8_but_to_load_again(
    target: str, disk_params: Any, any_config: ModelConfig
) -> None:
    int8 = convert(disk_params, "disk", "int8", any_config)
    with pytest.raises(ValueError, match=r"rounded away is lost. Load the model again"):
        convert(int8, "int8", target, any_config)
    assert_identical(convert(int8, "int8", "int8", any_config), int8)


def test_int8_said_to_be_floats_is_refused_in_every_part(
    disk_params: Any, any_config: ModelConfig
) -> None:
    params, config = untied(disk_params, any_config)
    int8 = convert(params, "disk", "int8", config)["llama"]
    floats = convert(params, "disk", "decode", config)["llama"]
    for part in (
        lambda t: {"layers": {"0": t["layers"]["0"]}},
        lambda t: {"lm_head": t["lm_head"]},
    ):
        with pytest.raises(ValueError, match="expected kernel without a scale"):
            convert({"llama": part(int8)}, "decode", "int8", config)
        with pytest.raises(ValueError, match="expected kernel with a scale"):
            convert({"llama": part(floats)}, "int8", "int8", config)
