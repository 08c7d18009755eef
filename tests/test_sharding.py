"""Every parameter has one place on the mesh, nothing falls through to a row for the rest, and a model runs there."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import UserError
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.kv_cache import init_cache
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params, apply_method, make_model
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.sharding import (
    AXES,
    RULES,
    cache_sharding,
    make_mesh,
    make_shardings,
    match_rule,
    replicated,
)
from tests.signature_checks import without_signature_checks

LAYOUTS = {"stacked": TRAIN, "decode": DECODE, "int8": DECODE_INT8}


def trees() -> dict[str, Any]:
    """Every preset in every layout."""
    found = {}
    for name, preset in PRESETS.items():
        tree = abstract_params(preset.model)
        found[f"{name}, per layer"] = tree
        for kind, layout in LAYOUTS.items():
            found[f"{name}, {kind}"] = jax.eval_shape(
                lambda t, layout=layout, llama=preset.model.llama: convert_layout(
                    t, DISK, layout, llama=llama
                ),
                tree,
            )
    return found


TREES = trees()


@pytest.mark.parametrize("name", TREES)
def test_every_parameter_is_met_by_one_row(name: str) -> None:
    for path in leaf_names(TREES[name]):
        assert len(match_rule(path)) == 1, path


def test_every_row_meets_a_parameter_of_some_preset() -> None:
    met = {
        rule for tree in TREES.values() for path in leaf_names(tree) for rule in match_rule(path)
    }
    assert met == set(RULES)


@pytest.mark.parametrize("name", TREES)
def test_specs_name_no_more_axes_than_the_parameter_has(name: str) -> None:
    tree = TREES[name]
    shardings = leaf_names(make_shardings(make_mesh(data=8), tree))
    for path, leaf in leaf_names(tree).items():
        assert len(shardings[path].spec) <= len(leaf.shape), path


@pytest.mark.parametrize("name", [n for n in TREES if not n.startswith("tiny")])
def test_most_of_a_model_is_split_and_what_is_not_is_small(name: str) -> None:
    """On eight abstract devices of a tensor-parallel mesh and of an fsdp one."""
    for axis in ("tensor", "fsdp"):
        sizes = dict.fromkeys(AXES, 1) | {axis: 8}
        if name.startswith("smol") and axis == "tensor":
            sizes[axis] = 3  # heads: 9 and 3
        mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
        tree = TREES[name]
        shardings = leaf_names(make_shardings(mesh, tree))
        whole = sum(leaf.size for leaf in leaf_names(tree).values())
        local = sum(
            int(np.prod(shardings[path].shard_shape(leaf.shape)))
            for path, leaf in leaf_names(tree).items()
        )
        assert local < whole * (1 / sizes[axis] + 0.04), (axis, local / whole)


def test_layers_of_a_stack_lie_where_single_ones_do() -> None:
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    per_layer, stacked = (
        leaf_names(make_shardings(mesh, TREES[f"tiny, {kind}"]))
        for kind in ("per layer", "stacked")
    )
    kernel = "self_attn/q_proj/kernel"
    assert per_layer[f"llama/layers/1/{kernel}"].spec == P("fsdp", "tensor")
    assert stacked[f"llama/layers/{kernel}"].spec == P(None, "fsdp", "tensor")
    assert stacked["llama/norm/scale"].spec == P()


def test_a_parameter_without_a_row_is_an_error() -> None:
    tree = {"llama": {"layers": {"0": {"gate": {"kernel": np.ones((2, 2))}}}}}
    with pytest.raises(ValueError, match="llama/layers/0/gate/kernel"):
        make_shardings(make_mesh(data=8), tree)


def test_sizes_that_the_mesh_does_not_divide_are_all_listed() -> None:
    tree = {
        "ln_vision": {"scale": np.ones(3), "bias": np.ones(3)},
        "llama": {
            "lm_head": {"kernel": np.ones((6, 5))},
            "embed_tokens": {"embedding": np.ones((4, 6))},
        },
    }
    with pytest.raises(UserError) as caught:
        make_shardings(make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]), tree)
    assert "llama/lm_head/kernel [6, 5]" in str(caught.value)
    assert "llama/embed_tokens/embedding [4, 6]" in str(caught.value)


def test_a_mesh_of_another_number_of_devices_is_refused() -> None:
    with pytest.raises(UserError, match=r"data=3 x fsdp=1 x tensor=1, 3 devices; expected 8"):
        make_mesh(data=3)


# --- the language model on a tensor-parallel mesh ------------------------------------------------------------------

WIDE = dataclasses.replace(
    PRESETS["tiny"].model,
    llama=dataclasses.replace(
        PRESETS["tiny"].model.llama, num_heads=8, num_kv_heads=4, tie_embeddings=False
    ),
)
"""Grouped-query attention with kv heads for four devices, and a head of its own."""
PROMPT, STEPS, CAPACITY = 9, 3, 16


@pytest.fixture(scope="module")
def wide_params(draw_params: Callable[[Any], Any]) -> Any:
    llama: Any = draw_params({"llama": abstract_params(WIDE)["llama"]})
    return llama


def read(params: Any, caches: Any, token_ids: Any, positions: Any, *, model: Any) -> Any:
    """Feeds tokens where `positions` says, and gives the logits behind each."""
    embeds = apply_method(model, params, "embed_prompt", token_ids, None)
    mask = make_cache_mask(positions, caches[0].capacity)
    hidden, caches, _ = apply_method(
        model, params, "decode", embeds, positions=positions, mask=mask, caches=caches
    )
    return apply_method(model, params, "head", hidden), caches


class Run:
    """The model on the first devices, as the engine has it: parameters and cache placed, the cache donated."""

    def __init__(
        self, params: Any, *, tensor: int, int8: bool, cache: Any = jnp.float32, cut: bool = True
    ) -> None:
        layout = dataclasses.replace(DECODE, int8=int8, shards=tensor if cut else 1)
        mesh = make_mesh(tensor=tensor, devices=jax.devices()[:tensor])
        placed = convert_layout(params, DISK, layout, llama=WIDE.llama)
        self.params = jax.device_put(placed, make_shardings(mesh, placed))
        place = cache_sharding(mesh, num_kv_heads=WIDE.llama.num_kv_heads)
        caches = init_cache(WIDE.llama, 3, capacity=CAPACITY, dtype=cache)
        self.caches = jax.device_put(caches, place)
        step = jax.jit(
            functools.partial(read, model=make_model(WIDE, layout=layout, dtype=jnp.float32)),
            donate_argnums=1,
            out_shardings=(replicated(mesh), place),
        )
        with jax.set_mesh(mesh), without_signature_checks():
            self.compiled = [
                step.lower(self.params, self.caches, *map(jnp.asarray, fed)).compile()
                for fed in feeds()[:2]
            ]

    def feed(self, token_ids: Any, positions: Any) -> Any:
        compiled = self.compiled[token_ids.shape[1] == 1]
        with without_signature_checks():
            logits, self.caches = compiled(self.params, self.caches, token_ids, positions)
        return np.asarray(logits)

    def addresses(self) -> list[int]:
        return [
            shard.data.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(self.caches)
            for shard in leaf.addressable_shards
        ]


@pytest.fixture(scope="module")
def runs(wide_params: Any) -> Callable[..., Run]:
    """Makes each `Run` once for all tests: compiling is what takes time here."""
    return functools.cache(functools.partial(Run, wide_params))


def feeds() -> list[Any]:
    """A prompt, then single tokens; one row is a place behind the others."""
    ids = np.random.default_rng(6).integers(0, WIDE.llama.vocab_size, (3, PROMPT + STEPS))
    places = np.broadcast_to(np.arange(PROMPT), (3, PROMPT))
    single = [(ids[:, [i]], np.array([[i], [i - 1], [i]])) for i in range(PROMPT, PROMPT + STEPS)]
    return [(ids[:, :PROMPT].astype(np.int32), places.astype(np.int32)), *single]


@pytest.mark.parametrize("int8", [False, True])
def test_prefill_and_steps_on_a_mesh_give_the_logits_of_one_device(
    runs: Callable[..., Run], int8: bool
) -> None:
    alone = runs(tensor=1, int8=int8)
    expected = [alone.feed(*fed) for fed in feeds()]
    assert min(float(np.std(logits)) for logits in expected) > 0.5  # a model that does something
    for tensor in (4,) if int8 else (2, 4):
        sharded = runs(tensor=tensor, int8=int8)
        for fed, logits in zip(feeds(), expected, strict=True):
            np.testing.assert_allclose(sharded.feed(*fed), logits, rtol=0, atol=2e-5)


def test_kernels_lie_in_shards(runs: Callable[..., Run]) -> None:
    run, llama = runs(tensor=4, int8=True), WIDE.llama
    layer = run.params["llama"]["layers"]["1"]
    qkv = (llama.num_heads + 2 * llama.num_kv_heads) * llama.head_dim
    for leaf, shape in (
        (layer["self_attn"]["qkv_proj"]["kernel"], (llama.width, qkv // 4)),
        (layer["self_attn"]["qkv_proj"]["kernel_scale"], (qkv // 4,)),
        (layer["mlp"]["gate_up_proj"]["kernel"], (llama.width, 2 * llama.mlp_width // 4)),
        (layer["mlp"]["down_proj"]["kernel"], (llama.mlp_width // 4, llama.width)),
        (layer["mlp"]["down_proj"]["kernel_scale"], (llama.width,)),
    ):
        assert [shard.data.shape for shard in leaf.addressable_shards] == [shape] * 4


@pytest.mark.parametrize(
    "setting",
    [{"tensor": 2, "int8": False, "cache": jnp.int8}, {"tensor": 4, "int8": True}],
    ids=["int8 cache", "float cache"],
)
def test_every_device_has_its_heads_of_the_cache_and_writes_them_in_place(
    runs: Callable[..., Run], setting: Any
) -> None:
    run, tensor = runs(**setting), setting["tensor"]
    for leaf in jax.tree.leaves(run.caches):
        own = (3, WIDE.llama.num_kv_heads // tensor, *leaf.shape[2:])
        assert [shard.data.shape for shard in leaf.addressable_shards] == [own] * tensor
    before, shardings = run.addresses(), [leaf.sharding for leaf in jax.tree.leaves(run.caches)]
    for fed in feeds()[:2]:
        run.feed(*fed)
        assert run.addresses() == before
    assert [leaf.sharding for leaf in jax.tree.leaves(run.caches)] == shardings
    bytes_of_one = sum(leaf.nbytes for leaf in jax.tree.leaves(run.caches)) // tensor
    for compiled in run.compiled:
        assert compiled.memory_analysis().alias_size_in_bytes == bytes_of_one


def exchanges(compiled: Any) -> list[str]:
    """What crosses devices in a compiled step, by name."""
    found = re.findall(
        r"(all-[a-z]+|collective-permute|reduce-scatter)[-a-z]*\(", compiled.as_text()
    )
    return sorted(found)


@pytest.mark.parametrize(
    "setting",
    [{"tensor": 2, "int8": False, "cache": jnp.int8}, {"tensor": 4, "int8": True}],
    ids=["int8 cache", "int8 kernels"],
)
def test_a_step_crosses_devices_once_for_each_pair_of_matmuls(
    runs: Callable[..., Run], setting: Any
) -> None:
    """And once for the embedding and once for the logits; neither a weight nor the cache is ever moved."""
    sums = 2 * WIDE.llama.num_layers + 1
    for compiled in runs(**setting).compiled:
        assert exchanges(compiled) == ["all-gather"] + ["all-reduce"] * sums


def test_fused_kernels_that_are_not_cut_for_the_mesh_are_moved_in_every_step(
    runs: Callable[..., Run],
) -> None:
    uncut = runs(tensor=2, int8=False, cut=False)
    assert {"collective-permute", "all-to-all"} & set(exchanges(uncut.compiled[1]))


def test_kv_heads_that_the_mesh_does_not_divide_are_refused() -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, 4), AXES)
    with pytest.raises(UserError, match=r"tensor=4 and the language model 6 kv heads.* 1, 2, 3, 6"):
        cache_sharding(mesh, num_kv_heads=6)


# --- several hosts ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh asks of a device; of hosts that are not there."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "none"

    @property
    def client(self) -> Any:
        return jax.devices()[0].client


def hosts_along(axis: str, **sizes: int) -> list[set[int]]:
    """Which of four hosts with two devices each stand at each place of an axis."""
    # Named in turn, so that the order of the devices alone would not do.
    devices: list[Any] = [FakeDevice(number, number % 4) for number in range(8)]
    with without_signature_checks():
        mesh = make_mesh(**sizes, devices=devices)
    grid = np.moveaxis(mesh.devices, AXES.index(axis), 0)
    return [{device.process_index for device in place.flat} for place in grid]


def test_data_crosses_the_hosts_and_nothing_else_does() -> None:
    assert hosts_along("data", data=4, fsdp=2) == [{0}, {1}, {2}, {3}]
    assert hosts_along("data", data=8) == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]
    assert hosts_along("data", data=4, tensor=2) == [{0}, {1}, {2}, {3}]
