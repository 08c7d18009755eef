"""The engine on a tensor-parallel mesh: the same answers, every device with its heads of the cache, in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.sharding import make_mesh, make_shardings
from tests.engines import make_engine, make_request

CONTEXT = 100


@pytest.fixture(scope="module")
def on_mesh(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    layout = dataclasses.replace(DECODE, shards=2)
    params = convert_layout(tiny_params, DISK, layout, llama=tiny_config.llama)
    placed = jax.device_put(params, make_shardings(mesh, params))
    return Engine(
        placed,
        tiny_config,
        dtype=jnp.float32,
        context=CONTEXT,
        num_slots=2,
        layout=layout,
        mesh=mesh,
    )


def requests(engine: Engine, prompts: Any) -> list[Request]:
    """Greedy and drawn, with pictures from the host and from the device."""
    side = engine.config.vit.image_size
    pixels = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    slots = [IMAGE_TOKEN_ID] * engine.config.num_image_tokens
    drawn = Sampling(temperature=1.5, top_p=0.9, seed=3)
    shown = Request(
        prompt=[5, *slots, *range(40), *slots, 7],
        image_embeds=engine.encode_images(pixels),
        max_new_tokens=8,
        sampling=drawn,
    )
    return [
        make_request(prompts[0]),
        *(make_request(prompt, sampling=drawn) for prompt in prompts[:2]),
        shown,
    ]


def test_a_mesh_answers_as_one_device_does(
    on_mesh: Engine, tiny_params: Any, tiny_config: ModelConfig, prompts: Any
) -> None:
    alone = make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=2)
    expected = [generation.ids for generation in alone.generate(requests(alone, prompts))]
    found = [generation.ids for generation in on_mesh.generate(requests(on_mesh, prompts))]
    assert found == expected


def test_a_mesh_searches_as_one_device_does(
    on_mesh: Engine, tiny_params: Any, tiny_config: ModelConfig
) -> None:
    alone = make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=2)
    expected, found = (
        engine.beam_search([make_request(([5, 6, 7], None), steps=5)], num_beams=3)
        for engine in (alone, on_mesh)
    )
    assert [one.ids for one in found[0]] == [one.ids for one in expected[0]]
    assert len(found[0]) == 3


def test_a_mesh_continues_what_a_slot_holds(
    on_mesh: Engine, tiny_params: Any, tiny_config: ModelConfig
) -> None:
    alone = make_engine(tiny_params, tiny_config, context=CONTEXT, num_slots=2)
    drawn = Sampling(temperature=1.5, seed=3)
    before = on_mesh.counters.extends
    for prompt in ([*range(50)], [*range(50), 7, 8]):
        request = make_request((prompt, None), sampling=drawn)
        assert list(on_mesh.stream(request)) == list(alone.stream(request))
    assert on_mesh.counters.extends == before + 1
    assert alone.counters.extends == 1


def test_every_device_keeps_its_heads_of_the_cache_in_place(on_mesh: Engine, prompts: Any) -> None:
    on_mesh.generate([make_request(prompts[0])])
    heads = on_mesh.config.llama.num_kv_heads
    for leaf in jax.tree.leaves(on_mesh._state.caches):
        assert leaf.sharding.spec == P(None, "tensor")
        assert {shard.data.shape[1] for shard in leaf.addressable_shards} == {heads // 2}
    programs = on_mesh._runner.programs
    program = programs._found["decode", programs.keys("decode")[0]]
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(on_mesh._state.caches)) // 2
    assert program.compiled.memory_analysis().alias_size_in_bytes >= cache


def test_parameters_that_are_cut_for_another_mesh_are_refused(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"layout.shards is 1; expected 2, the mesh's axis tensor"):
        make_engine(tiny_params, tiny_config, context=CONTEXT, mesh=mesh)
