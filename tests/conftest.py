"""What every test runs under: the CPU, full float32 precision, no silent broadcasting between ranks.

The environment must be set before JAX is imported, so this file sets it at its top; a machine with an accelerator runs
the same tests on it with JAX_PLATFORMS=cuda (or tpu).
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.presets import PRESETS

# Several CPU devices, so that shardings are more than a no-op. Single-device tests use the first and do not notice.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The model of the `tiny` tier: width 32, 2 layers, grouped-query attention, tied embeddings."""
    return PRESETS["tiny"].model


@pytest.fixture(scope="session")
def tiny_params(tiny_config: ModelConfig) -> dict[str, object]:
    """Random parameters of `tiny_config` in the disk layout, float32. Shared: never donate them."""
    from minigpt4_jax.models.minigpt4 import abstract_params

    abstract = abstract_params(tiny_config)
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
        jax.random.normal(key, leaf.shape, leaf.dtype) * 0.05
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)
