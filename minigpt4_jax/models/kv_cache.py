"""The KV cache: an explicit pytree argument, returned and donated. A slot's number is the token's position."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minigpt4_jax.config import LlamaConfig


@flax.struct.dataclass
class LayerCache:
    """Keys (after rope) and values of one layer. K and V stay apart: a joint array costs copies when it is updated.

    Heads stand before slots, as attention multiplies them: the other way round every step would transpose the cache.
    """

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    @property
    def num_slots(self) -> int:
        return self.k.shape[2]

    def update(
        self,
        k: Float[Array, "B Sq K H"],
        v: Float[Array, "B Sq K H"],
        positions: Int[Array, "B Sq"],
    ) -> LayerCache:
        """Writes a prompt into the slots from 0 (`Sq > 1`), or one token per row into its own slot (`Sq == 1`)."""
        if k.shape[1] > 1:
            start = (0, 0, 0, 0)
            k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
            return LayerCache(
                k=jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), start),
                v=jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), start),
            )
        rows = jnp.arange(k.shape[0])
        slots = positions[:, 0]
        return LayerCache(
            k=self.k.at[rows, :, slots].set(k[:, 0].astype(self.k.dtype)),
            v=self.v.at[rows, :, slots].set(v[:, 0].astype(self.v.dtype)),
        )

    def read(self, num_slots: int) -> tuple[Float[Array, "B Sk K H"], Float[Array, "B Sk K H"]]:
        """Keys and values of the first `num_slots` slots, in the order that `attend` takes."""
        k, v = self.k[:, :, :num_slots], self.v[:, :, :num_slots]
        return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


KVCache = tuple[LayerCache, ...]
"""One `LayerCache` per layer."""


def init_cache(config: LlamaConfig, batch: int, *, num_slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache. Slots beyond a row's position are masked, so their content never matters."""
    shape = (batch, config.num_kv_heads, num_slots, config.head_dim)
    return tuple(
        LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
        for _ in range(config.num_layers)
    )
