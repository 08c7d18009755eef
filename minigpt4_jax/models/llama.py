"""LLaMA (Vicuna, Llama-2, SmolLM2): the frozen language model, for training and decoding from one set of modules.

Ported from `minigpt4/models/modeling_llama.py` (Hugging Face LLaMA). Differences: it starts from embeddings, because
pictures are mixed in before it; the LM head is a call of its own, so that a loss can ask for the supervised positions
only; the KV cache is an argument; grouped-query attention and tied embeddings are options of the config.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minigpt4_jax.config import LlamaConfig
from minigpt4_jax.dims import Embeds, Mask, TokenIds
from minigpt4_jax.models.attention import attend
from minigpt4_jax.models.kv_cache import KVCache, LayerCache
from minigpt4_jax.models.layers import Dense, RMSNorm, run_blocks
from minigpt4_jax.models.rope import rotate


class SelfAttention(nn.Module):
    """Causal attention with rotary positions. `fused` reads one qkv kernel instead of three."""

    config: LlamaConfig
    fused: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Embeds, cache: LayerCache | None, positions: Int[Array, "B S"], mask: Mask
    ) -> tuple[Embeds, LayerCache | None]:
        cfg = self.config
        q_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        if self.fused:
            qkv = Dense(q_width + 2 * kv_width, False, self.dtype, name="qkv_proj")(x)
            q, k, v = jnp.split(qkv, [q_width, q_width + kv_width], axis=-1)
        else:
            q = Dense(q_width, False, self.dtype, name="q_proj")(x)
            k = Dense(kv_width, False, self.dtype, name="k_proj")(x)
            v = Dense(kv_width, False, self.dtype, name="v_proj")(x)
        lead = x.shape[:2]
        q = rotate(q.reshape(*lead, -1, cfg.head_dim), positions, base=cfg.rope_base)
        k = rotate(k.reshape(*lead, -1, cfg.head_dim), positions, base=cfg.rope_base)
        v = v.reshape(*lead, -1, cfg.head_dim)
        if cache is not None:
            cache = cache.update(k, v, positions)
            k, v = (part.astype(self.dtype) for part in cache.read(len(x), mask.shape[-1]))
        y = attend(q, k, v, mask=mask).reshape(*lead, q_width)
        return Dense(cfg.width, False, self.dtype, name="o_proj")(y), cache


class Mlp(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202)."""

    config: LlamaConfig
    fused: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Embeds) -> Embeds:
        width = self.config.mlp_width
        if self.fused:
            joint = Dense(2 * width, False, self.dtype, name="gate_up_proj")(x)
            gate, up = jnp.split(joint, 2, axis=-1)
        else:
            gate = Dense(width, False, self.dtype, name="gate_proj")(x)
            up = Dense(width, False, self.dtype, name="up_proj")(x)
        return Dense(self.config.width, False, self.dtype, name="down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm decoder layer."""

    config: LlamaConfig
    fused: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Embeds, cache: LayerCache | None, positions: Int[Array, "B S"], mask: Mask
    ) -> tuple[Embeds, LayerCache | None]:
        cfg = self.config
        y = RMSNorm(cfg.norm_eps, self.dtype, name="input_layernorm")(x)
        y, cache = SelfAttention(cfg, self.fused, self.dtype, name="self_attn")(
            y, cache, positions, mask
        )
        x = x + y
        y = RMSNorm(cfg.norm_eps, self.dtype, name="post_attention_layernorm")(x)
        return x + Mlp(cfg, self.fused, self.dtype, name="mlp")(y), cache


class Llama(nn.Module):
    """Embeddings to hidden states; `embed` and `head` are calls of their own."""

    config: LlamaConfig
    stacked: bool
    fused: bool
    dtype: DTypeLike

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = nn.Embed(cfg.vocab_size, cfg.width, dtype=self.dtype)
        self.norm = RMSNorm(cfg.norm_eps, self.dtype)
        if not cfg.tie_embeddings:
            self.lm_head = Dense(cfg.vocab_size, False, self.dtype)

    def embed(self, token_ids: TokenIds) -> Embeds:
        """Token embeddings. Ids below zero (image placeholders) get row 0; the caller replaces them."""
        return self.embed_tokens(jnp.maximum(token_ids, 0))

    def head(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32."""
        if self.config.tie_embeddings:
            # Not `Embed.attend`: for a single row, XLA's CPU compiler copies the transposed embedding first.
            embedding = self.embed_tokens.embedding.astype(self.dtype)
            return jax.lax.dot_general(
                hidden.astype(self.dtype), embedding, (((hidden.ndim - 1,), (1,)), ((), ()))
            ).astype(jnp.float32)
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
            stacked=self.stacked,
            block_args={"config": cfg, "fused": self.fused, "dtype": self.dtype},
            x=embeds.astype(self.dtype),
            caches=caches,
            args=(positions, mask),
        )
        return self.norm(x), caches, states
