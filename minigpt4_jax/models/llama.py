"""LLaMA (Vicuna, Llama-2, SmolLM2): the frozen language model, for training and decoding from one set of modules.

Ported from `minigpt4/models/modeling_llama.py` (Hugging Face LLaMA). Differences: it starts from embeddings, because
pictures are mixed in before it; the LM head is a call of its own, so that a loss can ask for the supervised positions
only; the KV cache is an argument; grouped-query attention and tied embeddings are options of the config.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minigpt4_jax.config import LlamaConfig
from minigpt4_jax.dims import Embeds, Mask, TokenIds
from minigpt4_jax.models.attention import attend
from minigpt4_jax.models.int8 import Int8Dense, Int8Embed
from minigpt4_jax.models.kv_cache import KVCache, LayerCache
from minigpt4_jax.models.layers import Dense, RMSNorm, multiply_rows, run_blocks
from minigpt4_jax.models.layout import Layout, fused_widths, split_columns
from minigpt4_jax.models.rope import rotate
from minigpt4_jax.sharding import constrain, constrain_rows


def make_matrix(
    features: int, layout: Layout, *, dtype: DTypeLike, name: str | None = None
) -> Dense | Int8Dense:
    """A product without a bias, in the form in which `layout` keeps its kernel. Call it inside a linen scope."""
    if layout.int8:
        return Int8Dense(features, dtype, name=name)
    return Dense(features, False, dtype, name=name)


def _named(x: Array, name: str, layout: Layout) -> Array:
    """In the layout for training: `x` laid where the mesh wants it, under the name by which `remat` may keep it."""
    return checkpoint_name(constrain_rows(x, name), name) if layout.stacked else x


class SelfAttention(nn.Module):
    """Causal attention with rotary positions; a fused layout reads one qkv kernel instead of three."""

    config: LlamaConfig
    layout: Layout
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Embeds, cache: LayerCache | None, positions: Int[Array, "B S"], mask: Mask
    ) -> tuple[Embeds, LayerCache | None]:
        cfg = self.config
        matrix = functools.partial(make_matrix, layout=self.layout, dtype=self.dtype)
        widths = fused_widths(cfg)["self_attn"]
        if self.layout.fused:
            joint = matrix(sum(widths), name="qkv_proj")(x)
            q, k, v = split_columns(joint, widths, self.layout.shards)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            q, k, v = (matrix(w, name=name)(x) for name, w in zip(names, widths, strict=True))
        lead = x.shape[:2]
        q = rotate(q.reshape(*lead, -1, cfg.head_dim), positions, base=cfg.rope_base)
        k = rotate(k.reshape(*lead, -1, cfg.head_dim), positions, base=cfg.rope_base)
        v = v.reshape(*lead, -1, cfg.head_dim)
        q, k, v = (_named(part, name, self.layout) for part, name in ((q, "q"), (k, "k"), (v, "v")))
        k_scale = v_scale = None
        if cache is not None:
            length = mask.shape[-1]
            cache = cache.update(k, v, positions, length=length)
            k, v = (part.astype(self.dtype) for part in cache.read(len(x), length))
            k_scale, v_scale = cache.read_scales(len(x), length)
        y = attend(q, k, v, mask=mask, k_scale=k_scale, v_scale=v_scale).reshape(*lead, -1)
        return matrix(cfg.width, name="o_proj")(y), cache


class Mlp(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202)."""

    config: LlamaConfig
    layout: Layout
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Embeds) -> Embeds:
        matrix = functools.partial(make_matrix, layout=self.layout, dtype=self.dtype)
        widths = fused_widths(self.config)["mlp"]
        if self.layout.fused:
            joint = matrix(sum(widths), name="gate_up_proj")(x)
            gate, up = split_columns(joint, widths, self.layout.shards)
        else:
            names = ("gate_proj", "up_proj")
            gate, up = (matrix(w, name=name)(x) for name, w in zip(names, widths, strict=True))
        gate, up = _named(gate, "gate", self.layout), _named(up, "up", self.layout)
        return matrix(self.config.width, name="down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm decoder layer."""

    config: LlamaConfig
    layout: Layout
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Embeds, cache: LayerCache | None, positions: Int[Array, "B S"], mask: Mask
    ) -> tuple[Embeds, LayerCache | None]:
        cfg = self.config
        x = _named(x, "x", self.layout)
        y = RMSNorm(cfg.norm_eps, self.dtype, name="input_layernorm")(x)
        y, cache = SelfAttention(cfg, self.layout, self.dtype, name="self_attn")(
            y, cache, positions, mask
        )
        x = _named(x + y, "x_mid", self.layout)
        y = RMSNorm(cfg.norm_eps, self.dtype, name="post_attention_layernorm")(x)
        x = x + Mlp(cfg, self.layout, self.dtype, name="mlp")(y)
        return _named(x, "x", self.layout), cache


class Llama(nn.Module):
    """Embeddings to hidden states; `embed` and `head` are calls of their own."""

    config: LlamaConfig
    layout: Layout
    dtype: DTypeLike
    remat: str = "none"
    """See `layers.run_blocks`."""

    def setup(self) -> None:
        cfg = self.config
        # Without a tied head the embedding is only looked up, a row per token: int8 would save no reading worth a loss.
        lookup: type[Int8Embed] | type[nn.Embed]
        lookup = Int8Embed if self.layout.int8 and cfg.tie_embeddings else nn.Embed
        self.embed_tokens = lookup(cfg.vocab_size, cfg.width, dtype=self.dtype)
        self.norm = RMSNorm(cfg.norm_eps, self.dtype)
        if not cfg.tie_embeddings:
            self.lm_head = make_matrix(cfg.vocab_size, self.layout, dtype=self.dtype)

    def embed(self, token_ids: TokenIds) -> Embeds:
        """Token embeddings. Ids below zero (image placeholders) get row 0; the caller replaces them."""
        return self.embed_tokens(jnp.maximum(token_ids, 0))

    def head(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32."""
        if isinstance(self.embed_tokens, Int8Embed):
            return self.embed_tokens.attend(hidden).astype(jnp.float32)
        if self.config.tie_embeddings:
            rows = self.embed_tokens.embedding
            return multiply_rows(hidden.astype(self.dtype), rows).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)

    @nn.compact
    def __call__(
        self,
        embeds: Embeds,
        *,
        positions: Int[Array, "B S"],
        mask: Mask,
        caches: KVCache | None,
    ) -> tuple[Embeds, KVCache | None, Float[Array, "L B S D"]]:
        """Runs the layers and the final norm.

        Args:
            embeds: token and image embeddings in the order of the prompt.
            positions: rotary position of each token; with a cache also the place it is written to.
            mask: True = attend; `[B, S, S]` without a cache, `[B, S, places]` with one. Only so many places are read,
                and only the first `B` rows of the caches.
            caches: one per layer (unstacked layout only), or None.

        Returns:
            Hidden states after the final norm, the updated caches, and the residual stream after every layer.
        """
        cfg = self.config
        x, caches, states = run_blocks(
            Block,
            cfg.num_layers,
            name="layers",
            stacked=self.layout.stacked,
            block_args={"config": cfg, "layout": self.layout, "dtype": self.dtype},
            x=constrain(embeds.astype(self.dtype)),
            caches=caches,
            args=(positions, mask),
            remat=self.remat,
        )
        return constrain(self.norm(x)), caches, states
