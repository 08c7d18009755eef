"""int8 with one float32 scale per slice: the rounding, and the modules that multiply with it.

For weights (`layout.py` says which) and for the KV cache. Activations are never quantised, and no value is kept apart:
the original loads its language model through bitsandbytes' LLM.int8() (arXiv 2208.07339), which multiplies outliers in
float16.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minigpt4_jax.models.layers import multiply_rows


def quantise(array: Any, axis: int) -> tuple[Any, Any]:
    """Rounds to int8 with one scale per slice along `axis`: `scale = max|x| / 127`, `x_int8 = round(x / scale)`.

    Symmetric "scale quantisation" of Wu et al. (arXiv 2004.09602, section 3.1.2); -128 is never used. Computed in
    float32, halves to even; the largest error is half a scale. A slice of zeros has the scale 1; one with a NaN or an
    infinity has that for its scale, so that whatever is multiplied with it shows it.

    Args:
        array: floats, NumPy or JAX; JAX arrays are computed with where they lie.
        axis: what one scale is shared along; the scales lack it.

    Returns:
        The int8 array in the shape of `array`, and the float32 scales.
    """
    xp = namespace(array)
    wide = array.astype(np.float32)
    largest = xp.max(xp.abs(wide), axis=axis, keepdims=True)
    # Not `/ 127`: XLA makes that a product with the reciprocal, and NumPy's bits would differ.
    scale = xp.where(largest == 0, np.float32(1), largest * np.float32(1 / 127))
    return xp.rint(wide / scale).astype(np.int8), xp.squeeze(scale, axis)


class Int8Dense(nn.Module):
    """`(x @ kernel) * kernel_scale` with an int8 kernel `[in, out]` and one float32 scale per output channel.

    The activations are not quantised. Parameters come from `convert_layout`; fresh ones are zeros.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.int8)
        scale = self.param("kernel_scale", nn.initializers.ones, (self.features,))
        # The scale comes after the matmul: then the kernel is only converted on its way in, which XLA fuses into the
        # matmul (bfloat16 has every int8 exactly). Scaled before it, the whole kernel would be written out in `dtype`.
        return _scale_columns(x.astype(self.dtype) @ kernel.astype(self.dtype), scale)


class Int8Embed(nn.Module):
    """A token embedding `[V, D]` that is the LM head too: int8 with one float32 scale per token."""

    num_embeddings: int
    features: int
    dtype: DTypeLike

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", nn.initializers.zeros, shape, jnp.int8)
        self.embedding_scale = self.param("embedding_scale", nn.initializers.ones, shape[:1])

    def __call__(self, token_ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        rows = self.embedding[token_ids].astype(jnp.float32)
        return (rows * self.embedding_scale[token_ids][..., None]).astype(self.dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The product with every token's row, scaled after it like `Int8Dense`."""
        return _scale_columns(
            multiply_rows(x.astype(self.dtype), self.embedding), self.embedding_scale
        )


def _scale_columns(y: Float[Array, "*B F"], scale: Float[Array, " F"]) -> Float[Array, "*B F"]:
    """In float32, so that a bfloat16 scale does not round each column a second time in one direction."""
    return (y.astype(jnp.float32) * scale[(None,) * (y.ndim - 1)]).astype(y.dtype)


def namespace(leaf: Any) -> Any:
    """`numpy` for what lies on the host, `jax.numpy` for what JAX computes with or traces."""
    return np if isinstance(leaf, np.ndarray) else jnp
