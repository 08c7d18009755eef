"""The engine's decode step exports for CPU, CUDA and TPU from a host that has none but the CPU: of the tiny model and
of the published 7B at full size, whose weights nobody needs for that.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.decode import decode_step
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.generation.state import init_state, make_settings
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, DISK, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params, make_model
from minigpt4_jax.presets import PRESETS
from tests.signature_checks import without_signature_checks

PLATFORMS = ("cpu", "cuda", "tpu")
SLOTS, ROWS, READ, CAPACITY = 4, 3, 64, 129
FORMS = {
    "bfloat16": (DECODE, jnp.bfloat16),
    "int8": (DECODE_INT8, jnp.int8),
}
"""Layout of the parameters and dtype of the cache."""


def make_step(config: ModelConfig, layout: Layout, *, plain: bool) -> Any:
    model = make_model(config, layout=layout, dtype=jnp.bfloat16)
    step = functools.partial(decode_step, model=model, rows=ROWS, places=READ, plain=plain)
    return jax.jit(step, donate_argnums=1)


def arguments(config: ModelConfig, llama: Any, *, layout: Layout, cache: Any) -> tuple[Any, ...]:
    """What a step takes, from the language model in the layout `DISK`: rows with settings of their own."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"llama": llama})
    params = convert_layout(params, DISK, layout, llama=config.llama)
    settings = [Sampling(), Sampling(temperature=1.0, top_p=0.9), Sampling(repetition_penalty=1.2)]
    state = dataclasses.replace(
        init_state(config.llama, SLOTS, capacity=CAPACITY, dtype=cache),
        token=40 + jnp.arange(SLOTS),
        position=jnp.arange(SLOTS),
        active=jnp.ones(SLOTS, bool),
        settings=make_settings(config.llama, [*settings, Sampling()], max_new_tokens=9),
    )
    return params, state, jnp.ones(SLOTS, bool)


@pytest.mark.parametrize(("layout", "cache"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("name", "plain"), [("tiny", True), ("tiny", False), ("vicuna-7b", False)])
def test_one_artefact_serves_every_platform(
    name: str, plain: bool, layout: Layout, cache: Any
) -> None:
    config = PRESETS[name].model
    make = functools.partial(arguments, config, layout=layout, cache=cache)
    with without_signature_checks():
        given = jax.eval_shape(make, abstract_params(config)["llama"])
        step = make_step(config, layout, plain=plain)
        exported = jax.export.export(step, platforms=PLATFORMS)(*given)
        assert exported.platforms == PLATFORMS
        # Whatever of the state is read comes back in its place.
        text = exported.mlir_module()
        caches = len(jax.tree.leaves(given[1].caches))
        assert caches < text.count("tf.aliasing_output") <= len(jax.tree.leaves(given[1]))
        assert "custom_call" not in text  # it all goes through XLA
        traced = jax.jit(exported.call).trace(*given)
        lowered = {traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS}
    assert len(lowered) == len(PLATFORMS)


@pytest.mark.parametrize(("layout", "cache"), FORMS.values(), ids=FORMS)
def test_the_artefact_does_what_the_step_does(
    layout: Layout, cache: Any, tiny_config: ModelConfig, tiny_params: Any
) -> None:
    step = make_step(tiny_config, layout, plain=False)
    make = functools.partial(
        arguments, tiny_config, tiny_params["llama"], layout=layout, cache=cache
    )
    with without_signature_checks():
        exported = jax.export.export(step, platforms=PLATFORMS)(*make())
        state, chosen = jax.jit(exported.call)(*make())
    expected_state, expected_chosen = step(*make())
    np.testing.assert_array_equal(chosen.token, expected_chosen.token)
    assert len(set(np.asarray(chosen.token).tolist())) > 1
    pairs = zip(*map(jax.tree.leaves, (state, expected_state)), strict=True)
    for leaf, expected in pairs:
        np.testing.assert_array_equal(leaf, expected)
