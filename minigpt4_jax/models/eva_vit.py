"""EVA-ViT: the frozen image tower, as MiniGPT-4 and BLIP-2 use it. Returns raw tokens, class token first.

Ported from `minigpt4/models/eva_vit.py`. Differences: no final norm either, but the caller's `ln_vision` has its own
eps; q/k/v are three projections (k has no bias) instead of one with two bias vectors; no dropout, no drop path.
A DINOv2 ViT fits the same module once its layer scales are folded (`convert/eva_vit.py`).
Not for: grouping patches and projecting them (`minigpt4.py`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minigpt4_jax.config import VitConfig
from minigpt4_jax.dims import Images
from minigpt4_jax.models.attention import attend
from minigpt4_jax.models.layers import Dense, LayerNorm, run_blocks

CUBIC_A = -0.75
"""The cubic kernel of torch's `interpolate(mode="bicubic")` and ONNX Resize. `jax.image.resize` has -0.5."""


class Attention(nn.Module):
    """Bidirectional multi-head attention with biases on q, v and the output, none on k."""

    config: VitConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "I P C"]) -> Float[Array, "I P C"]:
        cfg = self.config

        def heads(name: str, *, use_bias: bool) -> Float[Array, "I P N H"]:
            y = Dense(cfg.width, use_bias, self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], cfg.num_heads, cfg.head_dim)

        q = heads("q_proj", use_bias=True)
        k = heads("k_proj", use_bias=False)
        v = heads("v_proj", use_bias=True)
        y = attend(q, k, v, mask=None).reshape(x.shape)
        return Dense(cfg.width, True, self.dtype, name="o_proj")(y)


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` with the exact (erf) GELU."""

    config: VitConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "I P C"]) -> Float[Array, "I P C"]:
        y = Dense(self.config.mlp_width, True, self.dtype, name="fc1")(x)
        return Dense(self.config.width, True, self.dtype, name="fc2")(
            jax.nn.gelu(y, approximate=False)
        )


class Block(nn.Module):
    """Pre-norm block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    config: VitConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "I P C"], cache: None) -> tuple[Float[Array, "I P C"], None]:
        cfg = self.config
        x = x + Attention(cfg, self.dtype, name="attn")(
            LayerNorm(cfg.norm_eps, self.dtype, name="norm1")(x)
        )
        x = x + Mlp(cfg, self.dtype, name="mlp")(
            LayerNorm(cfg.norm_eps, self.dtype, name="norm2")(x)
        )
        return x, cache


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel = patch: each patch to one vector, raster order."""

    config: VitConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "I P C"]:
        cfg = self.config
        size = cfg.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 3, cfg.width))
        bias = self.param("bias", nn.initializers.zeros, (cfg.width,))
        count = images.shape[0]
        patches = images.astype(self.dtype).reshape(count, cfg.grid, size, cfg.grid, size, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(
            count, cfg.num_patches, size * size * 3
        )
        flat = kernel.reshape(size * size * 3, cfg.width).astype(self.dtype)
        return patches @ flat + bias.astype(self.dtype)[None, None]


class EvaVit(nn.Module):
    """Pictures to tokens. The parameters' position embedding already has the config's grid."""

    config: VitConfig
    stacked: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Images) -> tuple[Float[Array, "I P C"], Float[Array, "L I P C"]]:
        """Encodes pictures.

        Returns:
            The residual stream after the last block `[I, 1 + grid**2, width]` (no final norm), and the same after
            every block.

        Raises:
            ValueError: the pictures do not have the config's size.
        """
        cfg = self.config
        if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(
                f"Images are {images.shape}; expected [I, {cfg.image_size}, {cfg.image_size}, 3]."
            )
        x = PatchEmbed(cfg, self.dtype, name="patch_embed")(images)
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, cfg.width))
        pos = self.param(
            "pos_embed", nn.initializers.normal(0.02), (1, 1 + cfg.num_patches, cfg.width)
        )
        cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, cfg.width))
        x = jnp.concatenate([cls, x], axis=1) + pos.astype(self.dtype)
        x, _, states = run_blocks(
            Block,
            cfg.num_layers,
            name="blocks",
            stacked=self.stacked,
            block_args={"config": cfg, "dtype": self.dtype},
            x=x,
            caches=None,
            args=(),
        )
        return x, states


def resize_pos_embed(
    pos_embed: Float[np.ndarray, "1 P C"], grid: int
) -> Float[np.ndarray, "1 P2 C"]:
    """Resizes the patch part of a position embedding to another square grid; the class entry stays.

    Cubic convolution with a = -0.75, half-pixel centres, clamped borders and no antialias: what torch's
    `F.interpolate(mode="bicubic", align_corners=False)` does in the original's `interpolate_pos_embed`, and ONNX's
    Resize in the DINOv2 file. An equal grid returns the input unchanged.

    Raises:
        ValueError: the patch part is not a square grid.
    """
    patches = pos_embed[:, 1:]
    source = round(patches.shape[1] ** 0.5)
    if source**2 != patches.shape[1]:
        raise ValueError(
            f"The position embedding has {patches.shape[1]} patch entries; expected a square number."
        )
    if source == grid:
        return pos_embed
    weights = _cubic_weights(source, grid)
    square = patches[0].astype(np.float64).reshape(source, source, -1)
    resized = np.einsum("ay,bx,yxc->abc", weights, weights, square).astype(np.float32)
    return np.concatenate(
        [pos_embed[:, :1].astype(np.float32), resized.reshape(1, grid * grid, -1)], axis=1
    )


def _cubic_weights(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Row `t` holds the weights of the source cells for target cell `t` (Keys 1981, with the kernel's free `a`)."""
    weights = np.zeros((target, source))
    a = CUBIC_A
    for t in range(target):
        centre = (t + 0.5) * source / target - 0.5
        base = int(np.floor(centre))
        for cell in range(base - 1, base + 3):
            d = abs(centre - cell)
            if d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            elif d < 2:
                w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            else:
                w = 0.0
            weights[t, min(max(cell, 0), source - 1)] += w
    return weights
