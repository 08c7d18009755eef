"""What every test runs under: the CPU, full float32 precision, no silent broadcasting between ranks.

The environment must be set before JAX is imported, so this file sets it at its top; a machine with an accelerator runs
the same tests on it with JAX_PLATFORMS=cuda (or tpu).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.presets import PRESETS
from tests.drawn import draw

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
    """A function from an abstract tree to random float32 parameters: see `drawn.draw`."""
    return lambda abstract: jax.device_put(draw(abstract))


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
