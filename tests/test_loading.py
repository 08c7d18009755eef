"""From a model's name to its parameters: the dtype that suits the machine."""

from __future__ import annotations

import jax.numpy as jnp

from minigpt4_jax.loading import pick_dtype


def test_auto_is_float32_where_bfloat16_would_be_emulated() -> None:
    assert pick_dtype("float32") == pick_dtype("auto") == jnp.float32
    assert pick_dtype("bfloat16") == jnp.bfloat16
