"""MiniGPT-4, the composition: pictures -> image tower -> `ln_vision` -> Q-Former, or patches -> `llama_proj` -> LLM.

Ported from `minigpt4/models/minigpt4.py` and `minigpt_base.py`, with and without the Q-Former. Differences: text never
enters here; a prompt is ids in which `IMAGE_TOKEN_ID` marks one slot per image token, so shapes are static; padding is
masked instead of shuffled behind the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.dims import Embeds, Images, Mask, TokenIds
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.eva_vit import EvaVit
from minigpt4_jax.models.kv_cache import KVCache
from minigpt4_jax.models.layers import Dense, LayerNorm
from minigpt4_jax.models.layout import DISK, Layout
from minigpt4_jax.models.llama import Llama
from minigpt4_jax.models.qformer import QFormer

Params = dict[str, Any]


@flax.struct.dataclass
class Batch:
    """What `forward` reads. Rows are padded on either side; the pictures of a row are in prompt order."""

    token_ids: TokenIds
    attention_mask: Bool[Array, "B S"]
    images: Float[Array, "B N height width 3"]
    """`N` pictures per row, normalised; rows with fewer are padded with anything."""


@flax.struct.dataclass
class Output:
    """What `forward` returns."""

    logits: Float[Array, "B S V"]
    hidden: dict[str, Array]
    """The hidden states that were asked for, by name (see `HIDDEN`)."""


HIDDEN = {
    "vit.blocks": "[L, I, 1+P, C] residual stream after every block of the image tower",
    "ln_vision": "[I, 1+P, C] image tokens after ln_vision, class token first",
    "qformer.layer": "[1+L, I, Q, E] the normalised query tokens, then the queries after every layer of the Q-Former",
    "image_embeds": "[I, T, D] what llama_proj hands to the language model",
    "inputs_embeds": "[B, S, D] the mixed embedding of the prompt",
    "llama.layers": "[L, B, S, D] residual stream after every layer of the language model",
    "llama.norm": "[B, S, D] after the final norm",
}
"""Names that `forward(capture=...)` understands, and what they are; those of the Q-Former in models that have one."""


def hidden_names(config: ModelConfig) -> list[str]:
    """Names from `HIDDEN` of what such a model has, sorted."""
    return sorted(
        name for name in HIDDEN if config.qformer is not None or not name.startswith("qformer.")
    )


class MiniGPT4(nn.Module):
    """The whole model. Every method is pure: `model.apply({"params": params}, ..., method=...)`."""

    config: ModelConfig
    layout: Layout
    dtype: DTypeLike
    remat: str = "none"
    """What the backward pass through the language model finds ready; of the layout `TRAIN`. See `layers.run_blocks`."""

    def setup(self) -> None:
        cfg = self.config
        self.vit = EvaVit(cfg.vit, self.layout.stacked, self.dtype)
        self.ln_vision = LayerNorm(cfg.ln_vision_eps, self.dtype)
        if cfg.qformer is not None:
            self.qformer = QFormer(cfg.qformer, self.dtype)
        self.llama_proj = Dense(cfg.llama.width, True, self.dtype)
        self.llama = Llama(cfg.llama, self.layout, self.dtype, self.remat)

    def encode_vision(self, images: Images) -> tuple[Float[Array, "I R C"], dict[str, Array]]:
        """The frozen part of the image path: what `llama_proj` reads, and the hidden states on the way.

        Returns:
            Features `[I, *config.feature_shape]`: the Q-Former's outputs, or without one the patches after `ln_vision`
            (class token dropped); and by their names in `HIDDEN` the states that belong to pictures alone.
        """
        tokens, blocks = self.vit(images)
        tokens = self.ln_vision(tokens)
        states = {"vit.blocks": blocks, "ln_vision": tokens}
        if self.config.qformer is None:
            return tokens[:, 1:], states
        outputs, states["qformer.layer"] = self.query(tokens, image_mask=None)
        return outputs, states

    @nn.compact  # `query_tokens` is asked for only where the Q-Former runs; in `setup` every method would need it
    def query(
        self, tokens: Float[Array, "I P C"], *, image_mask: Bool[Array, "I P"] | None
    ) -> tuple[Float[Array, "I Q E"], Float[Array, "L I Q E"]]:
        """The Q-Former on the tokens after `ln_vision`, class token first: see `QFormer.__call__`."""
        cfg = self.config.qformer
        assert cfg is not None, "only models with a Q-Former can be asked"
        shape = (1, cfg.num_queries, cfg.width)
        queries = self.param("query_tokens", nn.initializers.normal(0.02), shape)
        return self.qformer(jnp.asarray(queries), tokens, image_mask=image_mask)

    def project(self, features: Float[Array, "I R C"]) -> Float[Array, "I T D"]:
        """The trained part: features of pictures to embeddings in the language model's space.

        Behind the Q-Former each row is projected alone. Without one, `patches_per_token` consecutive patches of one
        row of the picture (not a square block) are joined first, as in `encode_img` of the original. Features of
        several pictures may follow each other in one row of the batch; so do their tokens.
        """
        grouped = features.reshape(features.shape[0], -1, self.config.projection_in)
        return self.llama_proj(grouped)

    def encode_images(self, images: Images) -> Float[Array, "I T D"]:
        """Pictures to embeddings in the language model's space."""
        return self.project(self.encode_vision(images)[0])

    def embed_prompt(
        self, token_ids: TokenIds, image_embeds: Float[Array, "B R D"] | None
    ) -> Embeds:
        """Embeds a prompt: slot `IMAGE_TOKEN_ID` number `r` of a row receives row `r` of its image embeddings."""
        embeds = self.llama.embed(token_ids)
        if image_embeds is None:
            return embeds
        is_image = token_ids == IMAGE_TOKEN_ID
        rank = jnp.cumsum(is_image, axis=1) - 1
        rank = jnp.clip(rank, 0, image_embeds.shape[1] - 1)
        scattered = jnp.take_along_axis(image_embeds.astype(self.dtype), rank[:, :, None], axis=1)
        return jnp.where(is_image[:, :, None], scattered, embeds)

    def decode(
        self,
        embeds: Embeds,
        *,
        positions: Int[Array, "B S"],
        mask: Mask,
        caches: KVCache | None,
    ) -> tuple[Embeds, KVCache | None, Float[Array, "L B S D"]]:
        """The language model's layers and final norm; see `Llama.__call__`."""
        return self.llama(embeds, positions=positions, mask=mask, caches=caches)

    def head(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32."""
        return self.llama.head(hidden)

    def __call__(self, batch: Batch) -> tuple[Float[Array, "B S V"], dict[str, Array]]:
        rows = batch.images.shape[0]
        features, named = self.encode_vision(batch.images.reshape(-1, *batch.images.shape[2:]))
        image_embeds = self.project(features)
        embeds = self.embed_prompt(
            batch.token_ids, image_embeds.reshape(rows, -1, image_embeds.shape[-1])
        )
        positions = make_positions(batch.attention_mask)
        mask = make_causal_mask(batch.attention_mask)
        hidden, _, states = self.decode(embeds, positions=positions, mask=mask, caches=None)
        named |= {
            "image_embeds": image_embeds,
            "inputs_embeds": embeds,
            "llama.layers": states,
            "llama.norm": hidden,
        }
        return self.head(hidden), named


def make_positions(attention_mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions that count only real tokens, so that left and right padding read alike."""
    return jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)


def make_model(
    config: ModelConfig, *, layout: Layout, dtype: DTypeLike, remat: str = "none"
) -> MiniGPT4:
    """The linen module for parameters in `layout`, computing in `dtype`; `remat` as `layers.run_blocks` takes it."""
    return MiniGPT4(config, layout, dtype, remat)


def apply_method(model: MiniGPT4, params: Params, method: str, *args: Any, **kwargs: Any) -> Any:
    """`model.apply` of one method; linen's own return type adds mutable collections that we never have."""
    return model.apply({"params": params}, *args, method=method, **kwargs)


def forward(
    params: Params, batch: Batch, *, model: MiniGPT4, capture: Sequence[str] = ()
) -> Output:
    """The whole model as one pure function: pictures and prompt in, logits at every position out.

    Args:
        params: a full tree in the layout of `model`.
        batch: see `Batch`. Every row has exactly `N * num_image_tokens` placeholders, or fewer for padded pictures.
        model: from `make_model`; static under jit.
        capture: names from `hidden_names(config)` to return beside the logits.

    Raises:
        ValueError: `capture` has a name that this model does not have.
    """
    known = hidden_names(model.config)
    unknown = sorted(set(capture) - set(known))
    if unknown:
        raise ValueError(f"Unknown hidden states {unknown}; expected any of {known}.")
    logits, hidden = model.apply({"params": params}, batch)
    return Output(logits=logits, hidden={name: hidden[name] for name in capture})


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters in the `DISK` layout: for tests and full-size dry runs, not for training."""
    model = make_model(config, layout=DISK, dtype=jnp.float32)
    size = config.vit.image_size
    batch = Batch(
        token_ids=jnp.zeros((1, 1), jnp.int32),
        attention_mask=jnp.ones((1, 1), bool),
        images=jnp.zeros((1, 1, size, size, 3)),
    )
    params: Params = model.init(key, batch)["params"]
    return params


@functools.cache
def abstract_params(config: ModelConfig) -> Params:
    """Names, shapes and dtypes (float32) of the `DISK` layout, without allocating anything."""
    params: Params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return params
