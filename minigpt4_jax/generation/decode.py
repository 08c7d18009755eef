"""The device functions of the engine: `prefill` -> `insert` -> `decode_step`, and `extend`, over one explicit state.

Pure; the engine compiles them and donates the state. The state has a fixed number of rows, the slots, and a request
lives in one of them from `insert` to its last token. Rows are right-padded; a row's token at position `p` lives at
place `p` of its cache, so places left over from padding are overwritten before they are ever attended to. The original
left-pads, re-traces for every length, and cannot take in a request while others run.

A row that is not active is computed along and changes nothing that counts: it feeds its newest token to the same place
again and again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.generation.sampling import change_logits, choose, measure_logprobs
from minigpt4_jax.generation.state import Chosen, Prefix, Settings, SlotState
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.kv_cache import KVCache, init_cache, without_nan
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, apply_method


def prefill(
    params: Params,
    token_ids: Int[Array, "N P"],
    image_embeds: Float[Array, "N R D"],
    lengths: Int[Array, " N"],
    *,
    model: MiniGPT4,
    cache_dtype: DTypeLike,
) -> Prefix:
    """Reads prompts.

    Args:
        token_ids: right-padded; `IMAGE_TOKEN_ID` slots take the rows of `image_embeds` in order.
        image_embeds: rows beyond a prompt's placeholders are ignored.
        lengths: real tokens per row, at least 1.
    """
    batch, length = token_ids.shape
    caches = init_cache(model.config.llama, batch, capacity=length, dtype=cache_dtype)
    positions = jnp.broadcast_to(jnp.arange(length)[None], token_ids.shape)
    logits, caches = _read(
        params, caches, token_ids, image_embeds, positions, lengths, places=length, model=model
    )
    return Prefix(logits=logits, caches=caches)


def insert(
    state: SlotState,
    prefix: Prefix,
    row: Int[Array, ""],
    slot: Int[Array, ""],
    length: Int[Array, " 1"],
    settings: Settings,
) -> tuple[SlotState, Chosen]:
    """Puts row `row` of read prompts into a slot and chooses the first token of its answer. Donate `state`.

    Args:
        length: tokens of the prompt.
        settings: of this request; one row.
    """

    def write(leaf: Array, part: Array) -> Array:
        one = without_nan(jax.lax.dynamic_slice_in_dim(part, row, 1, axis=0))
        return jax.lax.dynamic_update_slice(leaf, one, (slot, *[0] * (leaf.ndim - 1)))

    caches = jax.tree.map(write, state.caches, prefix.caches)
    logits = jax.lax.dynamic_slice_in_dim(prefix.logits, row, 1, axis=0)
    return _open_slot(state, caches, logits, slot, length, settings)


def extend(
    params: Params,
    state: SlotState,
    slot: Int[Array, ""],
    token_ids: Int[Array, "1 P"],
    image_embeds: Float[Array, "1 R D"],
    start: Int[Array, ""],
    length: Int[Array, " 1"],
    settings: Settings,
    *,
    model: MiniGPT4,
    places: int,
) -> tuple[SlotState, Chosen]:
    """`prefill` and `insert` for a prompt whose first `start` tokens are in the slot already. Donate `state`.

    Args:
        token_ids: what follows them, right-padded; `start + P` is at most `places`.
        image_embeds: for the placeholders among `token_ids`.
        length: tokens of the whole prompt.
        places: how many places of the cache are read, from the first on.
    """
    row = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot, 1, axis=0), state.caches
    )
    part = tuple(cache.crop(places) for cache in row)
    positions = start + jnp.arange(token_ids.shape[1])[None]
    logits, part = _read(
        params, part, token_ids, image_embeds, positions, length - start, places=places, model=model
    )
    caches = jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_slice(
            leaf, without_nan(new), (slot, *[0] * (leaf.ndim - 1))
        ),
        state.caches,
        part,
    )
    return _open_slot(state, caches, logits, slot, length, settings)


def decode_step(
    params: Params,
    state: SlotState,
    alive: Bool[Array, " B"],
    *,
    model: MiniGPT4,
    rows: int,
    places: int,
    plain: bool,
) -> tuple[SlotState, Chosen]:
    """Feeds the newest token of the first `rows` slots and chooses the next ones. Donate `state`.

    Args:
        alive: False for rows that the host has given up (cancelled); they are active no more.
        places: how much of the caches is read: more than the position of any active row.
        plain: every active row is greedy without penalties and nobody asks for log-probabilities: nothing but the
            largest logit is looked for.
    """
    mine = _take_rows(state, rows)
    logits, caches = read_tokens(
        params, state.caches, mine.token, mine.position, places=places, model=model
    )
    active = mine.active & alive[:rows]
    mine, chosen = _advance(dataclasses.replace(mine, active=active), logits, plain=plain)
    return _put_rows(state, mine, caches, plain=plain), chosen


def read_tokens(
    params: Params,
    caches: KVCache,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    *,
    places: int,
    model: MiniGPT4,
) -> tuple[Float[Array, "B V"], KVCache]:
    """The half of a step that runs the model: feeds one token to each of the first rows, at the place `position`."""
    return _read(
        params, caches, token[:, None], None, position[:, None], jnp.ones_like(token),
        places=places, model=model,
    )  # fmt: skip


def move_row(state: SlotState, source: Int[Array, ""], target: Int[Array, ""]) -> SlotState:
    """Copies one slot over another one and leaves the first inactive. Donate `state`."""
    moved: SlotState = jax.tree.map(
        lambda leaf: jax.lax.dynamic_update_slice_in_dim(
            leaf, jax.lax.dynamic_slice_in_dim(leaf, source, 1, axis=0), target, axis=0
        ),
        state,
    )
    return dataclasses.replace(moved, active=moved.active.at[source].set(False))


def _read(
    params: Params,
    caches: KVCache,
    token_ids: Int[Array, "N P"],
    image_embeds: Float[Array, "N R D"] | None,
    positions: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    *,
    places: int,
    model: MiniGPT4,
) -> tuple[Float[Array, "N V"], KVCache]:
    """Logits after the last of `lengths` tokens, and the caches with all of them."""
    embeds = apply_method(model, params, "embed_prompt", token_ids, image_embeds)
    mask = make_cache_mask(positions, places)
    hidden, caches, _ = apply_method(
        model, params, "decode", embeds, positions=positions, mask=mask, caches=caches
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return apply_method(model, params, "head", last), caches


def _take_rows(state: SlotState, rows: int) -> SlotState:
    """The first rows of everything but the caches."""
    small: SlotState = jax.tree.map(lambda leaf: leaf[:rows], dataclasses.replace(state, caches=()))
    return small


def _put_rows(state: SlotState, rows: SlotState, caches: KVCache, *, plain: bool) -> SlotState:
    """Writes back what a step changes, and nothing that it does not."""

    def put(leaf: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(leaf, new, (0,) * leaf.ndim)

    settings = dataclasses.replace(
        state.settings,
        left=put(state.settings.left, rows.settings.left),
        no_stop=put(state.settings.no_stop, rows.settings.no_stop),
    )
    counts = state.counts
    if not plain:
        settings = dataclasses.replace(settings, seen=put(state.settings.seen, rows.settings.seen))
        counts = put(counts, rows.counts)
    return dataclasses.replace(
        state,
        token=put(state.token, rows.token),
        position=put(state.position, rows.position),
        active=put(state.active, rows.active),
        counts=counts,
        settings=settings,
        caches=caches,
    )


def _open_slot(
    state: SlotState,
    caches: KVCache,
    logits: Float[Array, "1 V"],
    slot: Int[Array, ""],
    length: Int[Array, " 1"],
    settings: Settings,
) -> tuple[SlotState, Chosen]:
    """Makes a slot the request's, its prompt being in the caches, and chooses the first token."""
    opened = SlotState(
        token=jnp.zeros(1, jnp.int32),
        position=length - 1,
        active=settings.left > 0,
        counts=jnp.zeros((1, logits.shape[-1]), jnp.int32),
        settings=settings,
        caches=(),
    )
    opened, chosen = _advance(opened, logits, plain=False)
    merged: SlotState = jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_slice(leaf, new, (slot, *[0] * (leaf.ndim - 1))),
        dataclasses.replace(state, caches=()),
        opened,
    )
    return dataclasses.replace(merged, caches=caches), chosen


def _advance(
    state: SlotState, logits: Float[Array, "B V"], *, plain: bool
) -> tuple[SlotState, Chosen]:
    """Chooses a token in every active row; `state` holds as many rows as `logits`, and its caches are left alone."""
    settings, position = state.settings, state.position + 1
    logprobs = None
    if plain:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        changed = change_logits(logits, settings.seen, state.counts, rows=settings.sampling)
        token = choose(_ban_stops(changed, settings), position, rows=settings.sampling)
        logprobs = measure_logprobs(logits, token)
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    chosen = Chosen(
        token=jnp.where(state.active, token, -1),
        finite=finite | ~state.active,
        logprobs=logprobs,
    )
    left = settings.left - state.active
    ended = jnp.any(settings.stops == token[:, None], axis=1)
    settings = dataclasses.replace(
        settings, left=left, no_stop=jnp.maximum(settings.no_stop - state.active, 0)
    )
    counts = state.counts
    if not plain:  # a plain row asks for neither
        written = jax.nn.one_hot(token, logits.shape[-1], dtype=bool) & state.active[:, None]
        settings = dataclasses.replace(settings, seen=settings.seen | written)
        counts = counts + written
    following = dataclasses.replace(
        state,
        token=jnp.where(state.active, token, state.token),
        position=jnp.where(state.active, position, state.position),
        active=state.active & finite & ~ended & (left > 0),
        counts=counts,
        settings=settings,
    )
    return following, chosen


def _ban_stops(logits: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """-inf for stop tokens where the answer must still go on."""
    rows = jnp.arange(len(logits))[:, None]
    banned = (settings.no_stop > 0)[:, None] & (settings.stops >= 0)
    columns = jnp.where(banned, settings.stops, logits.shape[-1])  # behind the end: dropped
    return logits.at[rows, columns].set(-jnp.inf, mode="drop")
