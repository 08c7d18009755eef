"""The KV cache: an explicit pytree argument, returned and donated. A token's place in a row is its position.

One cache per layer, K and V apart: a joint array, or all layers in one, costs whole copies when a part is updated. The
original has `past_key_values`, which grow by concatenation, and no int8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from minigpt4_jax.config import LlamaConfig
from minigpt4_jax.models.int8 import quantise

PLACES = {"k": 3, "v": 2, "k_scale": 2, "v_scale": 2}
"""Leaf of a `LayerCache` -> the axis of its places."""


@flax.struct.dataclass
class LayerCache:
    """Keys (after rope) and values of one layer, `S` places for each row.

    Heads stand before places, and the keys' places behind their numbers, as attention multiplies them: the other way
    round every step would transpose the cache, or read it across, which costs most where many rows are attended to on a
    CPU.

    Every leaf has the row and the head as its first two axes; `PLACES` says where its places are.
    """

    k: Num[Array, "B K H S"]
    v: Num[Array, "B K S H"]
    k_scale: Float[Array, "B K S"] | None = None
    """int8 caches only: what the keys of a place are to be multiplied with. float32: a bfloat16 scale would be off by
    as much again as the rounding to int8 is, and save 2 bytes of `H + 4`."""
    v_scale: Float[Array, "B K S"] | None = None

    @property
    def capacity(self) -> int:
        """Places of a row: the longest prompt plus answer."""
        return self.v.shape[2]

    def crop(self, length: int) -> LayerCache:
        """The first `length` places."""
        return self._each(lambda leaf, axis: jax.lax.slice_in_dim(leaf, 0, length, axis=axis))

    def resize(self, places: int) -> LayerCache:
        """With so many places: what is too much cut off, what is missing zero."""

        def pad(leaf: Array, axis: int) -> Array:
            widths = [(0, 0)] * leaf.ndim
            widths[axis] = (0, places - leaf.shape[axis])
            return jnp.pad(leaf, widths)

        return self.crop(min(places, self.capacity))._each(pad)

    def _each(self, change: Callable[..., Array], *others: LayerCache) -> LayerCache:
        """`change(leaf, leaves of the others, axis=the leaf's places)` for every leaf."""
        changed = {
            name: change(
                getattr(self, name), *(getattr(other, name) for other in others), axis=axis
            )
            for name, axis in PLACES.items()
            if getattr(self, name) is not None
        }
        replaced: LayerCache = self.replace(**changed)  # type: ignore[attr-defined] # flax's decorator adds it
        return replaced

    def update(
        self,
        k: Float[Array, "R Sq K H"],
        v: Float[Array, "R Sq K H"],
        positions: Int[Array, "R Sq"],
        *,
        length: int,
    ) -> LayerCache:
        """Writes into the first `R` rows; the rows behind them stay as they are.

        A stretch of a prompt (`Sq > 1`) goes to consecutive places from `positions[0, 0]` on, which is where all rows
        begin; one token per row (`Sq == 1`) goes to the row's own position.

        Args:
            length: places that are read afterwards, as in `read`. A single token's position is below it: on a TPU
                nothing is written beyond.
        """
        new = _stored(k, v, self.k.dtype)
        if k.shape[1] > 1:
            write = functools.partial(_write_stretch, start=positions[0, 0])
        else:
            write = functools.partial(_write_tokens, places=positions[:, 0], length=length)
        return self._each(write, new)

    def read(self, rows: int, length: int) -> tuple[Num[Array, "R Sk K H"], Num[Array, "R Sk K H"]]:
        """Keys and values of the first `rows` rows at the first `length` places, in the order that `attend` takes.

        Those of an int8 cache are still to be multiplied with `read_scales`.
        """
        k, v = self.k[:rows, :, :, :length], self.v[:rows, :, :length]
        return k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)

    def read_scales(
        self, rows: int, length: int
    ) -> tuple[Float[Array, "R K Sk"] | None, Float[Array, "R K Sk"] | None]:
        """The scales of what `read` gives, as `attend` takes them; None for a cache that is not int8."""
        if self.k_scale is None or self.v_scale is None:
            return None, None
        return self.k_scale[:rows, :, :length], self.v_scale[:rows, :, :length]


KVCache = tuple[LayerCache, ...]
"""One `LayerCache` per layer."""


def init_cache(config: LlamaConfig, batch: int, *, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache. Places beyond a row's position are masked, so their content never matters.

    Args:
        dtype: int8 makes caches with scales, one per token and head.
    """
    rows = (batch, config.num_kv_heads)
    quantised = jnp.dtype(dtype) == jnp.int8

    def empty_layer() -> LayerCache:  # arrays of its own: each is donated
        return LayerCache(
            k=jnp.zeros((*rows, config.head_dim, capacity), dtype),
            v=jnp.zeros((*rows, capacity, config.head_dim), dtype),
            k_scale=jnp.zeros((*rows, capacity), jnp.float32) if quantised else None,
            v_scale=jnp.zeros((*rows, capacity), jnp.float32) if quantised else None,
        )

    return tuple(empty_layer() for _ in range(config.num_layers))


def without_nan(x: Num[Array, "*S"]) -> Num[Array, "*S"]:
    """Zero where `x` is NaN or infinite, as nothing that outlives a request may be: to attention a masked place has the
    weight 0, and 0 times NaN is NaN, so that the next request in the row would be answered with NaN too."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def _stored(
    k: Float[Array, "R Sq K H"], v: Float[Array, "R Sq K H"], dtype: DTypeLike
) -> LayerCache:
    """What is written, in the cache's order of axes, `S` being `Sq`."""
    # NaN in a stretch goes on, so that a prompt of it is noticed; `insert` keeps it out of a slot.
    if k.shape[1] == 1:
        k, v = without_nan(k), without_nan(v)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    if dtype != jnp.int8:
        return LayerCache(k=k.astype(dtype), v=v.astype(dtype))
    (k_values, k_scale), (v_values, v_scale) = quantise(k, -2), quantise(v, -1)
    return LayerCache(k=k_values, v=v_values, k_scale=k_scale, v_scale=v_scale)


def _write_stretch(
    leaf: Num[Array, "B K ..."], new: Num[Array, "R K ..."], *, start: Int[Array, ""], axis: int
) -> Num[Array, "B K ..."]:
    at: list[Any] = [0] * leaf.ndim
    at[axis] = start
    return jax.lax.dynamic_update_slice(leaf, new, at)


def _write_tokens(
    leaf: Num[Array, "B K ..."],
    new: Num[Array, "R K ..."],
    *,
    places: Int[Array, " R"],
    length: int,
    axis: int,
) -> Num[Array, "B K ..."]:
    """One place in each row: by a scatter, or on a TPU, where that runs token by token (jax#21367), by a select.

    A program for one platform has one of the two and, compiled, no branch; one exported for several has both.
    """
    written: Array = jax.lax.platform_dependent(
        leaf,
        new,
        places,
        tpu=functools.partial(_select_tokens, length=length, axis=axis),
        default=functools.partial(_scatter_tokens, axis=axis),
    )
    return written


def _scatter_tokens(
    leaf: Num[Array, "B K ..."], new: Num[Array, "R K ..."], places: Int[Array, " R"], *, axis: int
) -> Num[Array, "B K ..."]:
    rows = jnp.arange(len(new))
    between = (slice(None),) * (axis - 1)
    return leaf.at[(rows, *between, places)].set(
        new.squeeze(axis), indices_are_sorted=True, unique_indices=True
    )


def _select_tokens(
    leaf: Num[Array, "B K ..."],
    new: Num[Array, "R K ..."],
    places: Int[Array, " R"],
    *,
    length: int,
    axis: int,
) -> Num[Array, "B K ..."]:
    """Rewrites the places that are read anyway, all but one with what they have."""
    window = jax.lax.slice_in_dim(leaf[: len(new)], 0, length, axis=axis)
    here = jnp.arange(length)[None] == places[:, None]
    here = jnp.expand_dims(here, [i for i in range(1, leaf.ndim) if i != axis])
    return jax.lax.dynamic_update_slice(leaf, jnp.where(here, new, window), (0,) * leaf.ndim)
