"""`prefill` and `decode_step`: one pure function each, over an explicit state that the caller donates.

Rows are right-padded; a row's token at position `p` lives in cache slot `p`, so slots left over from padding are
overwritten before they are ever attended to. The original left-pads and re-traces for every length.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.generation.sampling import Sampling, choose
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.kv_cache import KVCache
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, apply_method


@flax.struct.dataclass
class DecodeState:
    """Everything a running generation keeps on the device."""

    token: Int[Array, " B"]
    """The newest token of each row: chosen, not yet fed to the model."""
    position: Int[Array, " B"]
    """Where that token will stand."""
    seen: Bool[Array, "B V"]
    """Tokens that the repetition penalty counts as written."""
    caches: KVCache


def prefill(
    params: Params,
    caches: KVCache,
    token_ids: Int[Array, "B S"],
    image_embeds: Float[Array, "B R D"],
    lengths: Int[Array, " B"],
    seen: Bool[Array, "B V"],
    *,
    model: MiniGPT4,
    sampling: Sampling,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Reads the prompts and chooses the first token of each answer.

    Args:
        caches: slots enough for the prompt and the answer; the content does not matter; donate it.
        token_ids: right-padded; `IMAGE_TOKEN_ID` slots take the rows of `image_embeds` in order.
        image_embeds: rows beyond a prompt's placeholders are ignored.
        lengths: real tokens per row, at least 1.
        seen: tokens that count as already written. The original starts from the bos alone.
        sampling: with one seed per row, where tokens are drawn.

    Returns:
        The state after the first token, and the logits it was chosen from (before the penalty).
    """
    logits, caches = read_prompts(params, caches, token_ids, image_embeds, lengths, model=model)
    return _advance(logits, lengths, seen, caches, sampling), logits


def read_prompts(
    params: Params,
    caches: KVCache,
    token_ids: Int[Array, "B S"],
    image_embeds: Float[Array, "B R D"],
    lengths: Int[Array, " B"],
    *,
    model: MiniGPT4,
) -> tuple[Float[Array, "B V"], KVCache]:
    """The half of `prefill` that runs the model: logits of the first token of each answer, and the filled caches."""
    embeds = apply_method(model, params, "embed_prompt", token_ids, image_embeds)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1])[None], token_ids.shape)
    hidden, caches, _ = apply_method(
        model,
        params,
        "decode",
        embeds,
        positions=positions,
        mask=make_cache_mask(positions, token_ids.shape[1]),  # nothing stands behind the prompt
        caches=caches,
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return apply_method(model, params, "head", last), caches


def decode_step(
    params: Params,
    state: DecodeState,
    *,
    model: MiniGPT4,
    sampling: Sampling,
    num_slots: int | None = None,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """Feeds every row's newest token and chooses the next. Donate `state`: the caches are updated in place.

    `num_slots` is how much of the caches is read, more than any position of the step; None reads all of them.
    """
    logits, caches = read_tokens(
        params, state.caches, state.token, state.position, model=model, num_slots=num_slots
    )
    return _advance(logits, state.position + 1, state.seen, caches, sampling), logits


def read_tokens(
    params: Params,
    caches: KVCache,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    *,
    model: MiniGPT4,
    num_slots: int | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """The half of `decode_step` that runs the model: feeds one token per row, where `position` says it stands."""
    embeds = apply_method(model, params, "embed_prompt", token[:, None], None)
    positions = position[:, None]
    hidden, caches, _ = apply_method(
        model,
        params,
        "decode",
        embeds,
        positions=positions,
        mask=make_cache_mask(positions, num_slots or caches[0].capacity),
        caches=caches,
    )
    return apply_method(model, params, "head", hidden[:, 0]), caches


def _advance(
    logits: Float[Array, "B V"],
    position: Int[Array, " B"],
    seen: Bool[Array, "B V"],
    caches: KVCache,
    sampling: Sampling,
) -> DecodeState:
    token = choose(logits, seen, position, sampling=sampling)
    seen = seen | jax.nn.one_hot(token, seen.shape[-1], dtype=bool)
    return DecodeState(token=token, position=position, seen=seen, caches=caches)
