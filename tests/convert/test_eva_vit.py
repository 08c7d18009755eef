"""The image tower's tables put every tensor in its place, and folding DINOv2 into EVA changes nothing.

Each fault that a table can have makes one test fail: a transposed kernel `test_*_kernels_are_in_out`, a swapped part
`test_eva_qkv_is_split_in_order`, a dropped bias `test_*_table_drops_no_bias_and_nothing_else`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from convert import eva_vit as tables
from convert.problems import ConversionError
from convert.rules import Rule, convert, flatten
from convert.sources import ArraySource
from minigpt4_jax.config import ModelConfig, UserError, VitConfig
from minigpt4_jax.models.eva_vit import resize_pos_embed
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS

Arrays = dict[str, np.ndarray]


@pytest.fixture
def target(vit: VitConfig) -> dict[str, Any]:
    model: ModelConfig = dataclasses.replace(PRESETS["tiny"].model, vit=vit)
    return abstract_params(model)


@pytest.fixture
def eva_arrays(vit: VitConfig) -> Arrays:
    """A file like the original's: one block too many, a final norm and a head; a 4 x 4 grid."""
    rng = np.random.default_rng(4)
    d, f = vit.width, vit.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 17, d),
        "patch_embed.proj.weight": (d, 3, vit.patch_size, vit.patch_size),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "head.weight": (7, d),
        "head.bias": (7,),
    }
    for i in range(vit.num_layers + 1):
        name = f"blocks.{i}"
        shapes |= {f"{name}.{n}.{x}": (d,) for n in ("norm1", "norm2") for x in ("weight", "bias")}
        shapes |= {
            f"{name}.attn.q_bias": (d,),
            f"{name}.attn.v_bias": (d,),
            f"{name}.attn.qkv.weight": (3 * d, d),
            f"{name}.attn.proj.weight": (d, d),
            f"{name}.attn.proj.bias": (d,),
            f"{name}.mlp.fc1.weight": (f, d),
            f"{name}.mlp.fc1.bias": (f,),
            f"{name}.mlp.fc2.weight": (d, f),
            f"{name}.mlp.fc2.bias": (d,),
        }
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


def row(rules: tuple[Rule, ...], path: str) -> Rule:
    (found,) = (rule for rule in rules if rule.target == path)
    return found


# --- EVA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "source"),
    [("attn/o_proj", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")],
)
def test_eva_kernels_are_in_out(parameter: str, source: str, vit: VitConfig) -> None:
    rule = row(tables.eva_rules(vit), f"blocks/{{i}}/{parameter}/kernel")
    x = np.arange(16.0).reshape(4, 4)
    assert rule.sources == (f"blocks.{{i}}.{source}.weight",)
    np.testing.assert_array_equal(rule.op.apply(x), x.T)


def test_eva_qkv_is_split_in_order(vit: VitConfig) -> None:
    """q, k and v are one after the other in the rows of one matrix."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 4, 4))
    for name, expected in (("q", q), ("k", k), ("v", v)):
        rule = row(tables.eva_rules(vit), f"blocks/{{i}}/attn/{name}_proj/kernel")
        assert rule.sources == ("blocks.{i}.attn.qkv.weight",)
        np.testing.assert_array_equal(rule.op.apply(np.concatenate([q, k, v])), expected.T)


@pytest.mark.parametrize(
    ("parameter", "source"),
    [
        ("attn/q_proj/bias", "attn.q_bias"),
        ("attn/v_proj/bias", "attn.v_bias"),
        ("attn/o_proj/bias", "attn.proj.bias"),
        ("mlp/fc1/bias", "mlp.fc1.bias"),
        ("mlp/fc2/bias", "mlp.fc2.bias"),
        ("norm1/scale", "norm1.weight"),
        ("norm1/bias", "norm1.bias"),
        ("norm2/scale", "norm2.weight"),
        ("norm2/bias", "norm2.bias"),
    ],
)
def test_eva_vectors_come_from_their_own_name(parameter: str, source: str, vit: VitConfig) -> None:
    rules = [r for r in tables.eva_rules(vit) if r.target == f"blocks/{{i}}/{parameter}"]
    # A row that is not there is found by `test_eva_table_drops_no_bias_and_nothing_else`.
    assert [r.sources for r in rules] in ([(f"blocks.{{i}}.{source}",)], [])
    x = np.arange(4.0)
    assert all(np.array_equal(r.op.apply(x), x) for r in rules)


def test_eva_patch_kernel_is_the_same_convolution(vit: VitConfig) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 3, 7, 7))  # out, colour, height, width
    patch = rng.normal(size=(7, 7, 3))  # height, width, colour
    moved = row(tables.eva_rules(vit), "patch_embed/kernel").op.apply(kernel)
    expected = np.einsum("ochw,hwc->o", kernel, patch)
    np.testing.assert_allclose(np.einsum("hwco,hwc->o", moved, patch), expected, rtol=1e-12)


def test_eva_table_drops_no_bias_and_nothing_else(
    vit: VitConfig, target: dict[str, Any], eva_arrays: Arrays
) -> None:
    done = convert(
        ArraySource(eva_arrays),
        tables.eva_rules(vit),
        excuses=tables.eva_excuses(vit),
        target=target["vit"],
    )
    left_out = {name for name, _ in done.excused}
    last = {name for name in eva_arrays if name.startswith(f"blocks.{vit.num_layers}.")}
    assert left_out == last | {"norm.weight", "head.weight", "head.bias"}


def test_second_extra_block_is_not_excused(
    vit: VitConfig, target: dict[str, Any], eva_arrays: Arrays
) -> None:
    eva_arrays[f"blocks.{vit.num_layers + 1}.norm1.bias"] = np.zeros(vit.width, np.float32)
    with pytest.raises(ConversionError, match=rf"blocks\.{vit.num_layers + 1}\.norm1\.bias"):
        convert(
            ArraySource(eva_arrays),
            tables.eva_rules(vit),
            excuses=tables.eva_excuses(vit),
            target=target["vit"],
        )


def test_position_embedding_takes_the_grid_of_the_config(eva_arrays: Arrays) -> None:
    same = tables.resize_grid(4).apply(eva_arrays["pos_embed"])
    np.testing.assert_array_equal(same, eva_arrays["pos_embed"])
    larger = tables.resize_grid(6).apply(eva_arrays["pos_embed"])
    assert larger.shape == (1, 37, eva_arrays["pos_embed"].shape[2])
    np.testing.assert_array_equal(larger, resize_pos_embed(eva_arrays["pos_embed"], 6))


def test_half_precision_file_is_kept_or_widened(
    vit: VitConfig, target: dict[str, Any], eva_arrays: Arrays
) -> None:
    halves = ArraySource({name: x.astype(np.float16) for name, x in eva_arrays.items()})
    rules, excuses = tables.eva_rules(vit), tables.eva_excuses(vit)
    kept = convert(halves, rules, excuses=excuses, target=target["vit"]).params
    wide = convert(halves, rules, excuses=excuses, target=target["vit"], dtype=np.float32).params
    fc1, fc1_wide = (p["blocks"]["0"]["mlp"]["fc1"]["kernel"] for p in (kept, wide))
    assert (fc1.dtype, fc1_wide.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(fc1, fc1_wide)


def test_eva_config_reads_what_the_file_shows(vit: VitConfig, eva_arrays: Arrays) -> None:
    source = ArraySource(eva_arrays)
    found = tables.eva_config(
        source, grid=vit.grid, num_layers=vit.num_layers, num_heads=vit.num_heads
    )
    assert found == vit
    with pytest.raises(UserError, match=r"has no patch_embed\.proj\.weight"):
        tables.eva_config(ArraySource({}), grid=4, num_layers=2, num_heads=4)


# --- DINOv2 -----------------------------------------------------------------------------------------------------------

DINO_KERNELS = {
    "attn/q_proj": "attention/attention/query",
    "attn/k_proj": "attention/attention/key",
    "attn/v_proj": "attention/attention/value",
    "attn/o_proj": "attention/output/dense",
    "mlp/fc1": "mlp/fc1",
    "mlp/fc2": "mlp/fc2",
}


def test_dino_table_drops_no_bias_and_nothing_else(
    vit: VitConfig, target: dict[str, Any], dino_arrays: Arrays
) -> None:
    done = convert(
        ArraySource(dino_arrays),
        tables.dino_rules(vit),
        excuses=tables.DINO_EXCUSES,
        target={name: target[name] for name in ("vit", "ln_vision")},
    )
    left_out = {name for name, _ in done.excused}
    keys = {n for n in dino_arrays if n.endswith("attention.attention.key.bias")}
    assert left_out == keys | {"decoder.final_conv.weight"}


@pytest.mark.parametrize("parameter", DINO_KERNELS)
def test_dino_kernels_are_in_out(parameter: str, vit: VitConfig) -> None:
    """The ONNX file already multiplies from the right: only a layer scale may touch a kernel."""
    rule = row(tables.dino_rules(vit), f"vit/blocks/{{i}}/{parameter}/kernel")
    assert rule.sources[0] == f"/backbone/encoder/layer.{{i}}/{DINO_KERNELS[parameter]}/MatMul"
    x = np.arange(16.0).reshape(4, 4)
    ones = [np.ones(4)] * (len(rule.sources) - 1)
    np.testing.assert_array_equal(rule.op.apply(x, *ones), x)


@pytest.mark.parametrize(
    ("parameter", "scale"), [("attn/o_proj", "layer_scale1"), ("mlp/fc2", "layer_scale2")]
)
def test_folding_the_layer_scale_equals_applying_it(
    parameter: str, scale: str, vit: VitConfig
) -> None:
    rng = np.random.default_rng(0)
    kernel, bias, lambda1 = rng.normal(size=(6, 4)), rng.normal(size=4), rng.normal(size=4)
    x = rng.normal(size=(3, 6))
    rules = tables.dino_rules(vit)
    folded = [row(rules, f"vit/blocks/{{i}}/{parameter}/{leaf}") for leaf in ("kernel", "bias")]
    for rule in folded:
        assert rule.sources[1:] == (f"backbone.encoder.layer.{{i}}.{scale}.lambda1",)
    new_kernel, new_bias = (
        rule.op.apply(value, lambda1) for rule, value in zip(folded, (kernel, bias), strict=True)
    )
    np.testing.assert_allclose(x @ new_kernel + new_bias, (x @ kernel + bias) * lambda1, rtol=1e-12)


def test_layer_scale_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="a layer scale"):
        tables.fold_scale.apply(np.ones((4, 4)), np.ones(1))


def test_key_bias_can_go_because_softmax_does_not_see_it() -> None:
    rng = np.random.default_rng(0)
    x, wq, wk = rng.normal(size=(5, 4)), rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    bq, bk = rng.normal(size=4), rng.normal(size=4)

    def attention(key_bias: np.ndarray) -> np.ndarray:
        scores = np.exp((x @ wq + bq) @ (x @ wk + key_bias).T)
        return scores / scores.sum(axis=1, keepdims=True)

    np.testing.assert_allclose(attention(bk), attention(np.zeros(4)), rtol=1e-10)


def test_dino_positions_are_joined_and_resized(vit: VitConfig, dino_arrays: Arrays) -> None:
    rule = row(tables.dino_rules(vit), "vit/pos_embed")
    cls, patches = (dino_arrays[name] for name in rule.sources)
    done = rule.op.apply(cls, patches)
    assert done.shape == (1, 1 + vit.num_patches, vit.width)
    np.testing.assert_array_equal(done[:, :1], cls)
    joined = np.concatenate([cls, patches], axis=1)
    np.testing.assert_array_equal(done, resize_pos_embed(joined, vit.grid))


# --- BLIP-2 of Hugging Face -------------------------------------------------------------------------------------------


def as_hf(eva_arrays: Arrays, config: VitConfig) -> Arrays:
    """The same tower under Hugging Face's names, which give q, k and v one bias, with what such files hold besides."""
    renamed = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    }
    inside = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.projection"}
    inside |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "attn.qkv": "self_attn.qkv"}
    for i in range(config.num_layers):
        for eva, hf in inside.items():
            for leaf in ("weight", "bias"):
                renamed[f"blocks.{i}.{eva}.{leaf}"] = f"encoder.layers.{i}.{hf}.{leaf}"
    found = {
        f"vision_model.{hf}": eva_arrays[eva] for eva, hf in renamed.items() if eva in eva_arrays
    }
    for i in range(config.num_layers):
        q, v = (eva_arrays[f"blocks.{i}.attn.{x}_bias"] for x in "qv")
        name = f"vision_model.encoder.layers.{i}.self_attn.qkv.bias"
        found[name] = np.concatenate([q, np.zeros_like(q), v])
    extras = ("vision_model.post_layernorm.weight", "query_tokens", "qformer.layernorm.weight")
    extras += ("language_projection.bias", "language_model.lm_head.weight")
    return found | {name: np.ones(2, np.float32) for name in extras}


def test_hf_tower_converts_to_the_same_parameters_as_the_original_file(
    vit: VitConfig, target: dict[str, Any], eva_arrays: Arrays
) -> None:
    eva = convert(
        ArraySource(eva_arrays),
        tables.eva_rules(vit),
        excuses=tables.eva_excuses(vit),
        target=target["vit"],
    )
    held = as_hf(eva_arrays, vit)
    done = convert(
        ArraySource(held),
        tables.hf_vit_rules(vit),
        excuses=tables.HF_VIT_EXCUSES,
        target=target["vit"],
    )
    found, expected = dict(flatten(done.params)), dict(flatten(eva.params))
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    left_out = {name for name, _ in done.excused}
    assert left_out == {name for name in held if "vision_model.e" not in name}


def test_hf_bias_of_the_keys_must_be_zero(
    vit: VitConfig, target: dict[str, Any], eva_arrays: Arrays
) -> None:
    held = as_hf(eva_arrays, vit)
    held["vision_model.encoder.layers.1.self_attn.qkv.bias"][vit.width + 3] = 1e-8
    with pytest.raises(
        ConversionError, match=r"layers\.1\..*: 1 of the 32 biases of k are not zero"
    ):
        convert(
            ArraySource(held),
            tables.hf_vit_rules(vit),
            excuses=tables.HF_VIT_EXCUSES,
            target=target["vit"],
        )


def test_hf_config_reads_what_the_file_shows(vit: VitConfig, eva_arrays: Arrays) -> None:
    sizes = {"grid": vit.grid, "num_layers": vit.num_layers, "num_heads": vit.num_heads}
    assert tables.hf_vit_config(ArraySource(as_hf(eva_arrays, vit)), **sizes) == vit
    with pytest.raises(
        UserError, match=r"has no vision_model\.embeddings\.patch_embedding\.weight"
    ):
        tables.hf_vit_config(ArraySource(eva_arrays), **sizes)


def test_ln_vision_without_a_qformer_changes_nothing(
    vit: VitConfig, target: dict[str, Any]
) -> None:
    plain = tables.plain_ln_vision(vit)
    assert {name: x.shape for name, x in plain.items()} == {
        name: x.shape for name, x in target["ln_vision"].items()
    }
    assert (plain["scale"] == 1).all()
    assert not plain["bias"].any()
