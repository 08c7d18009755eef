"""Tables for the image tower: the original EVA file, BLIP-2 of Hugging Face, a DINOv2 backbone in ONNX -> `vit`.

For: `eva_vit_g.pth` and files with its names; the same tower inside BLIP-2 and InstructBLIP of Hugging Face; and the
DINOv2 ViT of the smol tier, which fits the EVA module exactly. Not for: the Q-Former and `ln_vision` (`qformer.py`).

Differs from the original: kernels are `[in, out]`, q, k and v are apart, position embeddings are resized here, once,
and what the original drops in silence (an extra block, final norm, head) is excused by name.

Why DINOv2 fits exactly: a constant added to all keys changes every score of a query by the same amount, which softmax
does not see, so its key bias can go; a layer scale multiplies the output of one linear layer, so it folds into that
layer; and its final norm is what MiniGPT-4 calls `ln_vision`.
"""

from __future__ import annotations

import numpy as np

from convert.rules import (
    Array,
    Excuse,
    Op,
    Rule,
    Tree,
    conv_kernel,
    fold_scale,
    identity,
    rows,
    transpose,
)
from convert.sources import TensorSource
from minigpt4_jax.config import UserError, VitConfig
from minigpt4_jax.models.eva_vit import resize_pos_embed

EVA_NORM_EPS = 1e-6
"""Of the blocks' LayerNorms, in the original's code (not in its file)."""


def eva_rules(config: VitConfig) -> tuple[Rule, ...]:
    """Names of the original `eva_vit_g.pth` -> the `vit` tree."""
    block, name = "blocks/{i}", "blocks.{i}"
    qkv = (f"{name}.attn.qkv.weight",)
    return (
        Rule("cls_token", ("cls_token",), identity),
        Rule("pos_embed", ("pos_embed",), resize_grid(config.grid)),
        Rule("patch_embed/kernel", ("patch_embed.proj.weight",), conv_kernel),
        Rule("patch_embed/bias", ("patch_embed.proj.bias",), identity),
        Rule(f"{block}/norm1/scale", (f"{name}.norm1.weight",), identity),
        Rule(f"{block}/norm1/bias", (f"{name}.norm1.bias",), identity),
        Rule(f"{block}/attn/q_proj/kernel", qkv, rows(0, 3).then(transpose)),
        Rule(f"{block}/attn/q_proj/bias", (f"{name}.attn.q_bias",), identity),
        Rule(f"{block}/attn/k_proj/kernel", qkv, rows(1, 3).then(transpose)),
        Rule(f"{block}/attn/v_proj/kernel", qkv, rows(2, 3).then(transpose)),
        Rule(f"{block}/attn/v_proj/bias", (f"{name}.attn.v_bias",), identity),
        Rule(f"{block}/attn/o_proj/kernel", (f"{name}.attn.proj.weight",), transpose),
        Rule(f"{block}/attn/o_proj/bias", (f"{name}.attn.proj.bias",), identity),
        Rule(f"{block}/norm2/scale", (f"{name}.norm2.weight",), identity),
        Rule(f"{block}/norm2/bias", (f"{name}.norm2.bias",), identity),
        Rule(f"{block}/mlp/fc1/kernel", (f"{name}.mlp.fc1.weight",), transpose),
        Rule(f"{block}/mlp/fc1/bias", (f"{name}.mlp.fc1.bias",), identity),
        Rule(f"{block}/mlp/fc2/kernel", (f"{name}.mlp.fc2.weight",), transpose),
        Rule(f"{block}/mlp/fc2/bias", (f"{name}.mlp.fc2.bias",), identity),
    )


def eva_config(source: TensorSource, *, grid: int, num_layers: int, num_heads: int) -> VitConfig:
    """Sizes that the file shows, joined with those that it cannot show.

    Args:
        grid: patches per side of the pictures the tower is for.
        num_layers: blocks to use; the published file has one more.
        num_heads: 16 in the published file.

    Raises:
        UserError: the file has no patch embedding under EVA's name.
    """
    patch, fc1 = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
    return _config(
        source, patch=patch, fc1=fc1, grid=grid, num_layers=num_layers, num_heads=num_heads
    )


def _config(
    source: TensorSource, *, patch: str, fc1: str, grid: int, num_layers: int, num_heads: int
) -> VitConfig:
    missing = [name for name in (patch, fc1) if name not in source.names()]
    if missing:
        raise UserError(
            f"{source.describe()} has no {' and no '.join(missing)}; expected the names of an EVA tower: the "
            "original's file, or BLIP-2 of Hugging Face."
        )
    width, _, patch_size, _ = source.shape(patch)
    return VitConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_width=source.shape(fc1)[0],
        norm_eps=EVA_NORM_EPS,
    )


def eva_excuses(config: VitConfig) -> tuple[Excuse, ...]:
    """What the file holds beyond the tower that MiniGPT-4 uses."""
    unused = "not part of MiniGPT-4, which takes the residual stream without a final norm or head"
    return (
        Excuse(
            f"blocks.{config.num_layers}.*",
            f"the file has one block more than the {config.num_layers} that are used",
        ),
        Excuse("norm.*", unused),
        Excuse("fc_norm.*", unused),
        Excuse("head.*", unused),
    )


def hf_vit_config(source: TensorSource, *, grid: int, num_layers: int, num_heads: int) -> VitConfig:
    """As `eva_config`, of BLIP-2 or InstructBLIP as Hugging Face names them.

    Args:
        num_layers: 39, as these files hold: they have no block that is not used.
    """
    patch, fc1 = "vision_model.embeddings.patch_embedding.weight", f"{HF_BLOCK.format(i=0)}.mlp.fc1"
    return _config(
        source,
        patch=patch,
        fc1=f"{fc1}.weight",
        grid=grid,
        num_layers=num_layers,
        num_heads=num_heads,
    )


HF_BLOCK = "vision_model.encoder.layers.{i}"


def hf_vit_rules(config: VitConfig) -> tuple[Rule, ...]:
    """Names of the tower in BLIP-2 and InstructBLIP of Hugging Face -> the `vit` tree."""
    block, attn, whole = "blocks/{i}", f"{HF_BLOCK}.self_attn", "vision_model.embeddings"
    qkv, qkv_bias = f"{attn}.qkv.weight", f"{attn}.qkv.bias"
    table = [
        Rule("cls_token", (f"{whole}.class_embedding",), identity),
        Rule("pos_embed", (f"{whole}.position_embedding",), resize_grid(config.grid)),
        Rule("patch_embed/kernel", (f"{whole}.patch_embedding.weight",), conv_kernel),
        Rule("patch_embed/bias", (f"{whole}.patch_embedding.bias",), identity),
        Rule(f"{block}/attn/q_proj/kernel", (qkv,), rows(0, 3).then(transpose)),
        Rule(f"{block}/attn/q_proj/bias", (qkv_bias,), rows(0, 3)),
        Rule(f"{block}/attn/k_proj/kernel", (qkv, qkv_bias), key_without_bias),
        Rule(f"{block}/attn/v_proj/kernel", (qkv,), rows(2, 3).then(transpose)),
        Rule(f"{block}/attn/v_proj/bias", (qkv_bias,), rows(2, 3)),
    ]
    for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        table.append(Rule(f"{block}/{ours}/scale", (f"{HF_BLOCK}.{theirs}.weight",), identity))
        table.append(Rule(f"{block}/{ours}/bias", (f"{HF_BLOCK}.{theirs}.bias",), identity))
    kernels = (
        ("attn/o_proj", "self_attn.projection"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")
    )  # fmt: skip
    for ours, theirs in kernels:
        table.append(Rule(f"{block}/{ours}/kernel", (f"{HF_BLOCK}.{theirs}.weight",), transpose))
        table.append(Rule(f"{block}/{ours}/bias", (f"{HF_BLOCK}.{theirs}.bias",), identity))
    return tuple(table)


HF_VIT_EXCUSES: tuple[Excuse, ...] = (
    Excuse(
        "vision_model.post_layernorm.*", "MiniGPT-4's `ln_vision`, which comes with the Q-Former"
    ),
    Excuse("query_tokens", "the Q-Former's, which has a table of its own"),
    Excuse("qformer.*", "the Q-Former, which has a table of its own"),
    Excuse("language_projection.*", "leads to BLIP-2's language model; MiniGPT-4 trains its own"),
    Excuse("language_model.*", "BLIP-2's language model; MiniGPT-4 has its own"),
)
"""What these files hold beside the tower."""


def _key_without_bias(weight: Array, bias: Array) -> Array:
    wrong = np.count_nonzero(rows(1, 3).apply(bias))
    if wrong:
        raise ValueError(
            f"{wrong} of the {len(bias) // 3} biases of k are not zero; EVA has none, so these are another model's"
        )
    return transpose.apply(rows(1, 3).apply(weight))


key_without_bias = Op("part 2 of 3, whose bias is zero, transpose to [in, out]", _key_without_bias)


def plain_ln_vision(config: VitConfig) -> Tree:
    """`ln_vision` where no Q-Former's file fills it: weight 1, bias 0, as the original initialises and freezes it."""
    return {
        "scale": np.ones(config.width, np.float32),
        "bias": np.zeros(config.width, np.float32),
    }


def dino_rules(config: VitConfig) -> tuple[Rule, ...]:
    """A DINOv2 backbone as Hugging Face exports it to ONNX -> the `vit` and `ln_vision` trees.

    Kernels are already `[in, out]` there; they are known by the path of the node that uses them (`OnnxSource`).
    """
    block = "vit/blocks/{i}"
    name, node = "backbone.encoder.layer.{i}", "/backbone/encoder/layer.{i}"
    attn, attn_node = f"{name}.attention.attention", f"{node}/attention/attention"
    out, out_node = f"{name}.attention.output.dense", f"{node}/attention/output/dense/MatMul"
    scale1, scale2 = f"{name}.layer_scale1.lambda1", f"{name}.layer_scale2.lambda1"
    patch = "backbone.embeddings.patch_embeddings.projection"
    positions = ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")
    return (
        Rule("vit/cls_token", ("backbone.embeddings.cls_token",), identity),
        Rule("vit/pos_embed", positions, join_positions.then(resize_grid(config.grid))),
        Rule("vit/patch_embed/kernel", (f"{patch}.weight",), conv_kernel),
        Rule("vit/patch_embed/bias", (f"{patch}.bias",), identity),
        Rule(f"{block}/norm1/scale", (f"{name}.norm1.weight",), identity),
        Rule(f"{block}/norm1/bias", (f"{name}.norm1.bias",), identity),
        Rule(f"{block}/attn/q_proj/kernel", (f"{attn_node}/query/MatMul",), identity),
        Rule(f"{block}/attn/q_proj/bias", (f"{attn}.query.bias",), identity),
        Rule(f"{block}/attn/k_proj/kernel", (f"{attn_node}/key/MatMul",), identity),
        Rule(f"{block}/attn/v_proj/kernel", (f"{attn_node}/value/MatMul",), identity),
        Rule(f"{block}/attn/v_proj/bias", (f"{attn}.value.bias",), identity),
        Rule(f"{block}/attn/o_proj/kernel", (out_node, scale1), fold_scale),
        Rule(f"{block}/attn/o_proj/bias", (f"{out}.bias", scale1), fold_scale),
        Rule(f"{block}/norm2/scale", (f"{name}.norm2.weight",), identity),
        Rule(f"{block}/norm2/bias", (f"{name}.norm2.bias",), identity),
        Rule(f"{block}/mlp/fc1/kernel", (f"{node}/mlp/fc1/MatMul",), identity),
        Rule(f"{block}/mlp/fc1/bias", (f"{name}.mlp.fc1.bias",), identity),
        Rule(f"{block}/mlp/fc2/kernel", (f"{node}/mlp/fc2/MatMul", scale2), fold_scale),
        Rule(f"{block}/mlp/fc2/bias", (f"{name}.mlp.fc2.bias", scale2), fold_scale),
        Rule("ln_vision/scale", ("backbone.layernorm.weight",), identity),
        Rule("ln_vision/bias", ("backbone.layernorm.bias",), identity),
    )


DINO_EXCUSES: tuple[Excuse, ...] = (
    Excuse(
        "backbone.encoder.layer.{i}.attention.attention.key.bias",
        "adds the same to every score of a query, which softmax does not see",
    ),
    Excuse("decoder.*", "the saliency head that this file was made for"),
)

join_positions = Op(
    "CLS entry before the patches", lambda cls, patches: np.concatenate([cls, patches], axis=1)
)


def resize_grid(grid: int) -> Op:
    """Position embeddings `[1, 1 + g * g, D]` to `[1, 1 + grid * grid, D]`; untouched where they already fit."""

    def apply(x: Array) -> Array:
        if x.ndim == 3 and x.shape[1] == 1 + grid * grid:
            return x
        return np.asarray(resize_pos_embed(x, grid))

    return Op(f"resize to a {grid} x {grid} grid", apply)
