"""Building blocks that more than one tower uses: norms, matrices and the stack of repeated blocks.

Not for: attention (`attention.py`) and rotary embeddings (`rope.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

KEPT = ("q", "k", "v", "x_mid", "gate", "up")
"""What a block of the language model keeps under `remat="names"`, beside its input: all that its backward pass reads.

A matmul with a frozen kernel needs no input there, for the gradient of its input is `dy @ kernel.T`. What is left are
the points where a nonlinearity begins: attention reads q, k and v (after rope), the second norm `x_mid`, SwiGLU both
halves; norms, softmax and silu are computed again from these. The names are given by `jax.ad_checkpoint`."""


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + eps) * scale`, reduced in float32 (Zhang & Sennrich, arXiv 1910.07467).

    Like the original (`modeling_llama.py`), the result is cast to the compute dtype before the scale.
    """

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return wide.astype(self.dtype) * scale.astype(self.dtype)[(None,) * (x.ndim - 1)]


class LayerNorm(nn.Module):
    """LayerNorm reduced in float32, returned in the compute dtype (`LayerNorm` in `base_model.py`)."""

    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        lead = (None,) * (x.ndim - 1)
        return (wide * scale[lead] + bias[lead]).astype(self.dtype)


class Dense(nn.Module):
    """`x @ kernel + bias` with the kernel `[in, out]`, computed in `dtype`."""

    features: int
    use_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)[(None,) * (y.ndim - 1)]
        return y


def multiply_rows(x: Float[Array, "*B D"], rows: Array) -> Float[Array, "*B V"]:
    """`x @ rows.T` in the dtype of `x`, for rows `[V, D]`.

    Not `Embed.attend`: for a single row of `x`, XLA's CPU compiler copies the transposed embedding first.
    """
    return jax.lax.dot_general(x, rows.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


class Unstacked(nn.Module):
    """Blocks "0", "1", ... one after the other: the layout on disk and for decoding.

    `caches` holds one entry per block (or `None`); each block returns `(x, cache)`.
    """

    block: type[nn.Module]
    num_layers: int
    block_args: Mapping[str, Any]  # linen freezes a dict

    @nn.compact
    def __call__(
        self, x: Array, caches: tuple[Any, ...] | None, *args: Any
    ) -> tuple[Array, tuple[Any, ...], list[Array]]:
        states, new_caches = [], []
        for i in range(self.num_layers):
            cache = None if caches is None else caches[i]
            x, cache = self.block(**self.block_args, name=str(i))(x, cache, *args)
            states.append(x)
            new_caches.append(cache)
        return x, tuple(new_caches), states


def run_blocks(
    block: type[nn.Module],
    num_layers: int,
    *,
    name: str,
    stacked: bool,
    block_args: Mapping[str, Any],
    x: Array,
    caches: tuple[Any, ...] | None,
    args: tuple[Any, ...],
    remat: str = "none",
) -> tuple[Array, tuple[Any, ...] | None, Array]:
    """Runs the repeated blocks of a tower inside the caller's linen scope.

    Args:
        stacked: True reads parameters with a leading layer axis and scans over them (training: one compiled body);
            False reads one sub-tree per layer (decoding: no copy of a layer's weights out of the stack).
        caches: one cache per layer, or None. Only the unstacked form takes caches.
        args: passed to every block after `x` and its cache.
        remat: of the stacked form, what a backward pass finds ready: `none` leaves it to JAX, which keeps every value
            that a derivative reads; `names` keeps the input of each block and `KEPT`; `full` the input alone.

    Returns:
        The last residual stream, the new caches, and the stream after every block `[L, ...]` (dead code unless the
        caller uses it).
    """
    if not stacked:
        x, new_caches, each = Unstacked(block, num_layers, block_args, name=name)(x, caches, *args)
        return x, (None if caches is None else new_caches), jnp.stack(each)
    if caches is not None:
        raise ValueError(
            "The stacked layout has no KV cache; convert the parameters to models.layout.DECODE first."
        )
    body: Any = _ScanBody
    if remat != "none":
        policies = {
            "names": jax.checkpoint_policies.save_only_these_names(*KEPT),
            "full": jax.checkpoint_policies.nothing_saveable,
        }
        # A loop's body is never merged with its recomputation: the barriers against that would only cost time.
        body = nn.remat(_ScanBody, policy=policies[remat], prevent_cse=False)
    scanned = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * len(args),
        length=num_layers,
    )
    x, states = scanned(block, block_args, name=name)(x, *args)
    return x, None, states


class _ScanBody(nn.Module):
    """One step of the scan: the block's parameters sit directly under the stack's name."""

    block: type[nn.Module]
    block_args: Mapping[str, Any]  # linen freezes dicts that pass through `nn.scan`

    @nn.compact
    def __call__(self, x: Array, *args: Any) -> tuple[Array, Array]:
        block = self.block(**self.block_args)
        nn.share_scope(self, block)
        x, _ = block(x, None, *args)
        return x, x
