"""One greedy decode step exports for CPU, CUDA and TPU from a host that has none but the CPU: of the tiny model and of
the published 7B at full size, whose weights nobody needs for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.kv_cache import init_cache
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, DISK, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import MiniGPT4, abstract_params, apply_method, make_model
from minigpt4_jax.presets import PRESETS
from tests.signature_checks import without_signature_checks

PLATFORMS = ("cpu", "cuda", "tpu")
ROWS, READ, CAPACITY = 3, 64, 129
FORMS = {
    "bfloat16": (DECODE, jnp.bfloat16),
    "int8": (DECODE_INT8, jnp.int8),
}
"""Layout of the parameters and dtype of the cache."""


def decode_step(
    params: Any, caches: Any, token: Any, position: Any, *, model: MiniGPT4
) -> tuple[Any, Any]:
    """Feeds each row's token at its position: the likeliest next ones, and the caches."""
    embeds = apply_method(model, params, "embed_prompt", token[:, None], None)
    hidden, caches, _ = apply_method(
        model,
        params,
        "decode",
        embeds,
        positions=position[:, None],
        mask=make_cache_mask(position[:, None], READ),
        caches=caches,
    )
    return jnp.argmax(apply_method(model, params, "head", hidden[:, 0]), -1), caches


def make_step(config: ModelConfig, layout: Layout) -> Any:
    model = make_model(config, layout=layout, dtype=jnp.bfloat16)
    return jax.jit(functools.partial(decode_step, model=model), donate_argnums=1)


def arguments(config: ModelConfig, llama: Any, *, layout: Layout, cache: Any) -> tuple[Any, ...]:
    """What a step takes, from the language model in the layout `DISK`."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"llama": llama})
    params = convert_layout(params, DISK, layout, llama=config.llama)
    caches = init_cache(config.llama, ROWS, capacity=CAPACITY, dtype=cache)
    rows = jnp.arange(ROWS)
    return params, caches, 40 + rows, rows


@pytest.mark.parametrize("name", ["tiny", "vicuna-7b"])
@pytest.mark.parametrize(("layout", "cache"), FORMS.values(), ids=FORMS)
def test_one_artefact_serves_every_platform(name: str, layout: Layout, cache: Any) -> None:
    config = PRESETS[name].model
    make = functools.partial(arguments, config, layout=layout, cache=cache)
    with without_signature_checks():
        given = jax.eval_shape(make, abstract_params(config)["llama"])
        exported = jax.export.export(make_step(config, layout), platforms=PLATFORMS)(*given)
        assert exported.platforms == PLATFORMS
        caches = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(given[1])]
        assert [(leaf.shape, leaf.dtype) for leaf in exported.out_avals[1:]] == caches
        text = exported.mlir_module()
        assert text.count("tf.aliasing_output") == len(caches)
        assert "custom_call" not in text  # it all goes through XLA
        traced = jax.jit(exported.call).trace(*given)
        lowered = {traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS}
    assert len(lowered) == len(PLATFORMS)


@pytest.mark.parametrize(("layout", "cache"), FORMS.values(), ids=FORMS)
def test_the_artefact_does_what_the_step_does(
    layout: Layout, cache: Any, tiny_config: ModelConfig, tiny_params: Any
) -> None:
    step = make_step(tiny_config, layout)
    make: Callable[[], Any] = functools.partial(
        arguments, tiny_config, tiny_params["llama"], layout=layout, cache=cache
    )
    with without_signature_checks():
        exported = jax.export.export(step, platforms=PLATFORMS)(*make())
        tokens, caches = jax.jit(exported.call)(*make())
    expected_tokens, expected_caches = step(*make())
    np.testing.assert_array_equal(tokens, expected_tokens)
    assert len(set(np.asarray(tokens).tolist())) > 1
    for leaf, expected in zip(*map(jax.tree.leaves, (caches, expected_caches)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
