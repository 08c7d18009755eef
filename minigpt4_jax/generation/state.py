"""What the engine keeps on the device, as documented pytrees, and how they are made. Not for: what happens to them."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.config import LlamaConfig
from minigpt4_jax.generation.sampling import Logprobs, Sampling, SamplingRows, make_rows
from minigpt4_jax.models.kv_cache import KVCache, init_cache

MAX_STOPS = 16
"""Stop tokens that one request may have."""


@flax.struct.dataclass
class Settings:
    """What `insert` is told about a request; `B` is 1 there and the number of slots in `SlotState`."""

    left: Int[Array, " B"]
    """Tokens that may still be chosen."""
    no_stop: Int[Array, " B"]
    """Tokens that must still be chosen before a stop token may be."""
    stops: Int[Array, "B M"]
    """Tokens that end the answer; -1 fills up."""
    seen: Bool[Array, "B V"]
    """Tokens that the repetition penalty counts as written."""
    sampling: SamplingRows


@flax.struct.dataclass
class SlotState:
    """Everything the running generations keep on the device."""

    token: Int[Array, " B"]
    """The newest token of each row: chosen, not yet fed to the model."""
    position: Int[Array, " B"]
    """Where that token stands."""
    active: Bool[Array, " B"]
    """Rows that another token is chosen for."""
    counts: Int[Array, "B V"]
    """How often each token was chosen in the answer."""
    settings: Settings
    caches: KVCache


@flax.struct.dataclass
class Chosen:
    """What the host reads of a step: one entry per row that it ran over. JAX arrays until they are read."""

    token: Int[Array | np.ndarray, " B"]
    """-1 in rows that were not active."""
    finite: Bool[Array | np.ndarray, " B"]
    """False where the logits held NaN or infinity: the token means nothing and the row is not active any more."""
    logprobs: Logprobs | None
    """None from a plain step."""


@flax.struct.dataclass
class Prefix:
    """Prompts that were read: what `insert` puts into a slot, and beams start from."""

    logits: Float[Array, "N V"]
    """Of the first token of each answer."""
    caches: KVCache
    """`N` rows with as many places as the bucket of the prompts has tokens."""


def init_state(
    config: LlamaConfig, num_slots: int, *, capacity: int, dtype: DTypeLike
) -> SlotState:
    """Slots that nothing was inserted into yet. `capacity` is the places of each, `dtype` that of the cache."""
    zeros = jnp.zeros(num_slots, jnp.int32)
    return SlotState(
        token=zeros,
        position=zeros,
        active=jnp.zeros(num_slots, bool),
        counts=jnp.zeros((num_slots, config.vocab_size), jnp.int32),
        settings=make_settings(config, [Sampling()] * num_slots),
        caches=init_cache(config, num_slots, capacity=capacity, dtype=dtype),
    )


def make_settings(
    config: LlamaConfig,
    sampling: list[Sampling],
    *,
    max_new_tokens: int = 0,
    min_new_tokens: int = 0,
    stop_tokens: tuple[int, ...] = (),
    written: tuple[int, ...] = (),
) -> Settings:
    """Settings of some rows that differ in their sampling only.

    Raises:
        ValueError: more than `MAX_STOPS` stop tokens.
    """
    if len(stop_tokens) > MAX_STOPS:
        raise ValueError(f"There are {len(stop_tokens)} stop tokens; expected at most {MAX_STOPS}.")
    rows = len(sampling)
    seen = np.zeros((rows, config.vocab_size), bool)
    seen[:, list(written)] = True
    stops = np.full((rows, MAX_STOPS), -1, np.int32)
    stops[:, : len(stop_tokens)] = stop_tokens
    return Settings(
        left=jnp.full(rows, max_new_tokens, jnp.int32),
        no_stop=jnp.full(rows, min_new_tokens, jnp.int32),
        stops=jnp.asarray(stops),
        seen=jnp.asarray(seen),
        sampling=make_rows(sampling, vocab_size=config.vocab_size),
    )
