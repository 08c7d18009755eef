"""What a training run carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

Projection = dict[str, Array | np.ndarray]
"""`{"kernel": [projection_in, D], "bias": [D]}`, float32; in NumPy where it comes from or goes to a file."""


class TrainState(NamedTuple):
    """The trained leaf, its optimizer and the number of finished steps. A few tens of MB: cheap to save often.

    A plain tuple of trees, so that it may hold arrays, their abstract shapes or their shardings alike.
    """

    step: Int[Array, ""]
    """-1 - step after a step whose loss or gradient was not finite: its update was not made, nor any after it."""
    projection: Projection
    opt_state: Any


class TrainBatch(NamedTuple):
    """One batch on the devices. Rows are right-padded; the vision part was computed beforehand.

    A plain tuple for the reason that `TrainState` is one.
    """

    token_ids: Int[Array, "B S"]
    attention_mask: Bool[Array, "B S"]
    target_positions: Int[Array, "B A"]
    """Position whose hidden state predicts the target."""
    target_ids: Int[Array, "B A"]
    target_mask: Bool[Array, "B A"]
    """True = this target counts in the loss."""
    features: Float[Array, "B R C"]
    """Frozen vision features of the row's pictures: see `MiniGPT4.encode_vision`."""


def init_state(projection: Projection, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32), projection=projection, opt_state=tx.init(projection)
    )
