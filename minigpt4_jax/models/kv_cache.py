"""The KV cache: an explicit pytree argument, returned and donated. A token's place in a row is its position.

One cache per layer, K and V apart: a joint array, or all layers in one, costs whole copies when a part is updated.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minigpt4_jax.config import LlamaConfig


@flax.struct.dataclass
class LayerCache:
    """Keys (after rope) and values of one layer, `S` places for each row.

    Heads stand before places, as attention multiplies them: the other way round every step would transpose the cache.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    @property
    def capacity(self) -> int:
        """Places of a row: the longest prompt plus answer."""
        return self.k.shape[2]

    def update(
        self,
        k: Float[Array, "R Sq K H"],
        v: Float[Array, "R Sq K H"],
        positions: Int[Array, "R Sq"],
    ) -> LayerCache:
        """Writes into the first `R` rows; the rows behind them stay as they are.

        A stretch of a prompt (`Sq > 1`) goes to consecutive places from `positions[0, 0]` on, which is where all rows
        begin; one token per row (`Sq == 1`) goes to the row's own position.
        """
        if k.shape[1] > 1:
            start = (0, 0, positions[0, 0], 0)
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
            return LayerCache(
                k=jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), start),
                v=jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), start),
            )
        rows = jnp.arange(k.shape[0])
        places = positions[:, 0]
        k, v = without_nan(k[:, 0]), without_nan(v[:, 0])
        return LayerCache(
            k=self.k.at[rows, :, places].set(k.astype(self.k.dtype)),
            v=self.v.at[rows, :, places].set(v.astype(self.v.dtype)),
        )

    def read(
        self, rows: int, length: int
    ) -> tuple[Float[Array, "R Sk K H"], Float[Array, "R Sk K H"]]:
        """Keys and values of the first `rows` rows at the first `length` places, in the order that `attend` takes."""
        k, v = self.k[:rows, :, :length], self.v[:rows, :, :length]
        return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def without_nan(x: Array) -> Array:
    """Zero where `x` is NaN or infinite, as nothing that outlives a request may be: to attention a masked place has the
    weight 0, and 0 times NaN is NaN, so that the next request in the row would be answered with NaN too."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


KVCache = tuple[LayerCache, ...]
"""One `LayerCache` per layer."""


def init_cache(config: LlamaConfig, batch: int, *, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache. Places beyond a row's position are masked, so their content never matters."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    return tuple(
        LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
        for _ in range(config.num_layers)
    )
