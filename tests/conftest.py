"""What every test runs under: the CPU, full float32 precision, no silent broadcasting between ranks.

The environment must be set before JAX is imported, so this file sets it at its top; a machine with an accelerator runs
the same tests on it with JAX_PLATFORMS=cuda (or tpu).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.presets import PRESETS

# Several CPU devices, so that shardings are more than a no-op. Single-device tests use the first and do not notice.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# What one test compiled, the next one finds, in the other xdist processes too: most of them run the same tiny model.
PROGRAMS = "MINIGPT4_TEST_PROGRAMS"
_MADE_HERE = PROGRAMS not in os.environ
if _MADE_HERE:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="minigpt4-programs-")
jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure() -> None:
    if _MADE_HERE:
        shutil.rmtree(os.environ[PROGRAMS], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The model of the `tiny` tier: width 32, 2 layers, grouped-query attention, tied embeddings."""
    return PRESETS["tiny"].model


@pytest.fixture(scope="session")
def draw_params() -> Callable[[Any], Any]:
    """A function from an abstract tree to random float32 parameters, each leaf seeded by its name.

    Lively on purpose: kernels keep the variance of what passes through them and norms scale by about 1, so that a
    wrong mask, rope or head order moves the logits far beyond any tolerance. (Small weights everywhere would leave
    the residual stream alone and let such a mistake pass.)
    """

    def draw_leaf(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        path = "/".join(key.key for key in keys)
        noise = np.random.default_rng(zlib.crc32(path.encode())).normal(size=leaf.shape)
        match keys[-1].key:
            case "kernel":
                noise /= math.prod(leaf.shape[:-1]) ** 0.5
            case "scale":
                noise = 1 + 0.2 * noise
            case _:  # biases and embeddings
                noise *= 0.5
        return jax.device_put(noise.astype(np.float32))

    return lambda abstract: jax.tree_util.tree_map_with_path(draw_leaf, abstract)


@pytest.fixture(scope="session")
def tiny_params(tiny_config: ModelConfig, draw_params: Callable[[Any], Any]) -> dict[str, Any]:
    """Random parameters of `tiny_config` in the disk layout, float32. Shared: never donate them."""
    from minigpt4_jax.models.minigpt4 import abstract_params

    params: dict[str, Any] = draw_params(abstract_params(tiny_config))
    return params


@pytest.fixture(scope="session", params=["tiny", "tiny-qformer"])
def any_config(request: pytest.FixtureRequest) -> ModelConfig:
    """The two models of the `tiny` tier in turn: image tokens are groups of patches, or a Q-Former's queries."""
    return PRESETS[request.param].model


@pytest.fixture(scope="session")
def any_params(any_config: ModelConfig, draw_params: Callable[[Any], Any]) -> dict[str, Any]:
    """As `tiny_params`, of `any_config`."""
    from minigpt4_jax.models.minigpt4 import abstract_params

    params: dict[str, Any] = draw_params(abstract_params(any_config))
    return params
