"""The Q-Former: 32 learned queries look at a picture's tokens and become its image tokens. Frozen, as in MiniGPT-4.

Ported from `minigpt4/models/Qformer.py` (BERT-base with cross-attention, from BLIP-2, arXiv 2301.12597), cut down to
what `encode_img` runs: the queries alone, both attentions bidirectional, and the queries' own feed-forward.
Differences: no word or position embeddings, text feed-forward, pooler, dropout, caches or head masks; masks are bool.
Not for: BERT with text beside the queries (InstructBLIP), and loading weights (`convert/qformer.py`).

Its layers differ (every second one has a cross-attention), so they are kept one sub-tree each in every layout: they
are called `layer`, as in BERT, and not `layers`, which `layout.py` stacks and fuses.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from minigpt4_jax.config import QFormerConfig
from minigpt4_jax.models.attention import attend
from minigpt4_jax.models.layers import Dense, LayerNorm

Queries = Float[Array, "I Q E"]


class Attention(nn.Module):
    """Multi-head attention of the queries to `context`, biases on all four projections."""

    config: QFormerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Queries, context: Float[Array, "I Sk W"], mask: Bool[Array, "I Sq Sk"] | None
    ) -> Queries:
        cfg = self.config

        def heads(name: str, of: Array) -> Float[Array, "I S N H"]:
            y = Dense(cfg.width, True, self.dtype, name=name)(of)
            return y.reshape(*y.shape[:2], cfg.num_heads, cfg.head_dim)

        q, k, v = heads("q_proj", x), heads("k_proj", context), heads("v_proj", context)
        y = attend(q, k, v, mask=mask).reshape(x.shape)
        return Dense(cfg.width, True, self.dtype, name="o_proj")(y)


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` with the exact (erf) GELU: BERT's `intermediate_query` and `output_query`."""

    config: QFormerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Queries) -> Queries:
        y = Dense(self.config.mlp_width, True, self.dtype, name="fc1")(x)
        return Dense(self.config.width, True, self.dtype, name="fc2")(
            jax.nn.gelu(y, approximate=False)
        )


class Layer(nn.Module):
    """Post-norm layer: `norm(x + f(x))` for the self-attention, the cross-attention if it has one, and the MLP."""

    config: QFormerConfig
    has_cross_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Queries,
        image_tokens: Float[Array, "I P C"],
        image_mask: Bool[Array, "I Q P"] | None,
    ) -> Queries:
        cfg = self.config
        x = self._normed(
            "attention_norm", x + Attention(cfg, self.dtype, name="attention")(x, x, None)
        )
        if self.has_cross_attention:
            cross = Attention(cfg, self.dtype, name="cross_attention")
            x = self._normed("cross_attention_norm", x + cross(x, image_tokens, image_mask))
        return self._normed("mlp_norm", x + Mlp(cfg, self.dtype, name="mlp")(x))

    def _normed(self, name: str, x: Queries) -> Queries:
        return LayerNorm(self.config.norm_eps, self.dtype, name=name)(x)


class Layers(nn.Module):
    """The layers "0", "1", ... one after the other."""

    config: QFormerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Queries,
        image_tokens: Float[Array, "I P C"],
        image_mask: Bool[Array, "I Q P"] | None,
    ) -> list[Array]:
        states = []
        for i in range(self.config.num_layers):
            has_cross = self.config.has_cross_attention(i)
            x = Layer(self.config, has_cross, self.dtype, name=str(i))(x, image_tokens, image_mask)
            states.append(x)
        return states


class QFormer(nn.Module):
    """Query tokens and a picture's tokens to the picture's query outputs."""

    config: QFormerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        query_tokens: Float[Array, "1 Q E"],
        image_tokens: Float[Array, "I P C"],
        *,
        image_mask: Bool[Array, "I P"] | None,
    ) -> tuple[Queries, Float[Array, "L I Q E"]]:
        """Runs the queries over the pictures; none sees another's.

        Args:
            query_tokens: the learned queries, the same for every picture.
            image_tokens: after `ln_vision`, class token included.
            image_mask: True = attend; None = everything, as MiniGPT-4 does.

        Returns:
            The queries after the last layer, and `[1 + num_layers, I, Q, E]`: the normalised query tokens, then the
            queries after every layer.
        """
        cfg = self.config
        count = image_tokens.shape[0]
        x = LayerNorm(cfg.norm_eps, self.dtype, name="norm")(query_tokens)
        x = jnp.broadcast_to(x, (count, *x.shape[1:]))
        mask = None
        if image_mask is not None:
            mask = jnp.broadcast_to(
                image_mask[:, None], (count, cfg.num_queries, image_tokens.shape[1])
            )
        states = Layers(cfg, self.dtype, name="layer")(x, image_tokens.astype(self.dtype), mask)
        return states[-1], jnp.stack([x, *states])
