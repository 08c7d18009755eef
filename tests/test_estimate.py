"""estimate.py: memory and exchange as counted by hand, and the mesh that follows from them."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.estimate import (
    USABLE,
    MemoryEstimate,
    MeshChoice,
    pick_mesh,
    saved_elements,
    step_time,
    train_memory,
)
from minigpt4_jax.exchange import Exchange, step_exchange
from minigpt4_jax.flops import vision_flops
from minigpt4_jax.hardware import GIB, Slice, parse_gpu, parse_tpu
from minigpt4_jax.presets import PRESETS

SEVEN, THIRTEEN = PRESETS["vicuna-7b"].model, PRESETS["vicuna-13b"].model
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
STAGE_1: dict[str, Any] = {
    "batch_size": 256,
    "length": 65,
    "targets": 32,
    "dtype_bytes": 2,
    "vision": False,
}
TOWER = 2 * (985_894_528 + 2_816 + 24_576 + 105_137_664)
"""Bytes of the image tower and the Q-Former."""
AUTO = {"data": 0, "fsdp": 0, "tensor": 0}


def memory(model: ModelConfig, *, remat: str = "names", **changed: Any) -> MemoryEstimate:
    given = {"mesh": ONE, **STAGE_1, **changed}
    return train_memory(model, remat=remat, **given)


def choose(
    model: ModelConfig, target: Slice, asked: dict[str, int] | None = None, **changed: Any
) -> MeshChoice:
    given = {"remat": "names", **STAGE_1, **changed}
    return pick_mesh(model, target=target, chips=target.chips, asked=asked or AUTO, **given)


def test_the_frozen_weights_take_two_bytes_each_and_are_split_by_fsdp_and_tensor() -> None:
    assert memory(SEVEN).weights == 2 * 6_738_423_808
    assert memory(THIRTEEN).weights == 2 * 13_015_874_560
    whole = memory(SEVEN).weights
    for mesh in ({**ONE, "fsdp": 8}, {**ONE, "tensor": 8}):
        assert memory(SEVEN, mesh=mesh).weights == pytest.approx(whole / 8, rel=1e-3)
    assert memory(SEVEN, mesh={**ONE, "data": 8}).weights == whole


def test_a_layer_keeps_five_widths_and_two_of_the_mlp_of_each_token() -> None:
    llama = SEVEN.llama
    assert saved_elements(llama, "names", tensor=1) == 5 * llama.width + 2 * llama.mlp_width
    assert saved_elements(llama, "full", tensor=1) == llama.width
    kept = memory(SEVEN).activations
    assert kept == 256 * 65 * 32 * 2 * (5 * 4096 + 2 * 11008)


def test_grouped_heads_keep_less() -> None:
    llama = PRESETS["smol"].model.llama
    kv = 2 * llama.num_kv_heads * llama.head_dim
    assert saved_elements(llama, "names", tensor=1) == 3 * 576 + kv + 2 * 1536


def test_the_batch_is_split_by_data_and_fsdp_and_its_columns_by_tensor() -> None:
    whole = memory(SEVEN).activations
    assert memory(SEVEN, mesh={"data": 2, "fsdp": 4, "tensor": 1}).activations == whole // 8
    half = memory(SEVEN, mesh={**ONE, "tensor": 2}).activations
    stream = 256 * 65 * 32 * 2 * 2 * 4096  # what stays whole on both
    assert half == (whole - stream) // 2 + stream


def test_the_optimizer_holds_the_projection_alone() -> None:
    assert memory(SEVEN).optimizer == (768 + 1) * 4096 * 16
    assert memory(SEVEN, mesh={**ONE, "fsdp": 8}).optimizer == memory(SEVEN).optimizer


def test_logits_are_those_of_the_targets() -> None:
    assert memory(SEVEN).logits == 256 * 32 * 32001 * 14
    assert memory(SEVEN, targets=15).logits == 256 * 15 * 32001 * 14
    head = 32001 * 4096 * 2  # gathered, and parts of logits summed
    assert memory(SEVEN, mesh={**ONE, "tensor": 2}).logits == 256 * 32 * 32001 * 20 + head


def test_pictures_cost_memory_only_in_the_loop() -> None:
    assert memory(SEVEN).vision == 0
    assert memory(SEVEN, vision=True).vision > TOWER


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_every_device_holds_the_whole_tower_and_encodes_the_pictures_of_its_rows(axis: str) -> None:
    """As `training/vision.py` lays them: `replicated(mesh)`, and rows over data and fsdp."""
    whole, half = (memory(SEVEN, mesh=mesh, vision=True).vision for mesh in (ONE, {**ONE, axis: 2}))
    assert half - TOWER == (whole - TOWER) // (1 if axis == "tensor" else 2)
    target, work = parse_tpu("v5e:1x1"), {**STAGE_1, "remat": "names"}
    cached, pictures = (
        step_time(SEVEN, target=target, mesh={**ONE, axis: 2}, **{**work, "vision": vision})
        for vision in (False, True)
    )
    assert cached.exchange == pictures.exchange
    encoding = (pictures.compute - cached.compute) * target.device.flops_per_s * target.chips
    assert encoding == pytest.approx(256 * vision_flops(SEVEN) * (2 if axis == "tensor" else 1))


@pytest.mark.parametrize("targets", [1, 64])
def test_a_total_is_the_sum_of_what_is_there_at_a_time(targets: int) -> None:
    need = memory(SEVEN, vision=True, remat="full", targets=targets)
    at_once = max(need.layer, need.logits)  # logits are gone when the layers go backward
    assert need.total == need.weights + need.activations + at_once + need.optimizer + need.vision


@pytest.mark.parametrize(
    ("sizes", "remat", "gib"),
    [
        ((4, 1, 1), "names", 24.82),
        ((4, 1, 1), "none", 44.04),
        ((4, 1, 1), "full", 14.44),
        ((1, 8, 1), "names", 8.04),
        ((4, 1, 2), "names", 14.09),
    ],
)
def test_the_estimate_is_what_the_tpu_compiler_says(
    sizes: tuple[int, int, int], remat: str, gib: float
) -> None:
    # libtpu 0.0.52, 7B, arguments and temporaries; benchmarks/results/plan.json has more of them.
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert memory(SEVEN, mesh=mesh, remat=remat).total / GIB == pytest.approx(gib, rel=0.015)


def test_policies_keep_less_in_their_order() -> None:
    none, names, full = (memory(SEVEN, remat=remat).total for remat in ("none", "names", "full"))
    assert none > 1.5 * names
    assert names > 1.5 * (full - memory(SEVEN).weights)


def exchange(model: ModelConfig, mesh: dict[str, int]) -> Exchange:
    shape = {name: STAGE_1[name] for name in ("batch_size", "length", "targets", "dtype_bytes")}
    return step_exchange(model, mesh=mesh, **shape)


def test_fsdp_moves_the_weights_twice_whatever_the_batch() -> None:
    moved = exchange(SEVEN, {**ONE, "fsdp": 8}).fsdp
    assert moved == pytest.approx(
        2 * 2 * 6.738e9 * 7 / 8, rel=1e-3
    )  # 27 GB but for a device's own eighth
    assert exchange(SEVEN, {**ONE, "data": 8}).fsdp == 0


def test_tensor_parallel_sums_the_stream_four_times_a_layer() -> None:
    found = exchange(SEVEN, {**ONE, "tensor": 4}).tensor
    by_hand = 4 * 32 * 1.5 * 256 * 65 * 4096 * 2
    logits = 1.5 * 256 * 32 * 32001 * 4
    assert found == pytest.approx(by_hand + logits)


def test_data_parallel_exchanges_the_projections_gradient_alone() -> None:
    moved = exchange(SEVEN, {**ONE, "data": 8})
    assert moved.total == moved.gradient == pytest.approx(12.6e6 * 2 * 7 / 8, rel=1e-2)


def test_the_floor_of_a_step_is_its_longest_limit() -> None:
    h200 = parse_gpu("h200:1")
    time = step_time(SEVEN, target=h200, mesh=ONE, remat="names", **{**STAGE_1, "vision": True})
    assert time.exchange == 0
    assert time.floor == time.compute == pytest.approx(256 * 2.243e12 / 989e12, rel=5e-3)
    slow = step_time(
        SEVEN, target=parse_tpu("v5e:2x4"), mesh={**ONE, "fsdp": 8}, remat="names", **{**STAGE_1, "batch_size": 64}
    )  # fmt: skip
    assert slow.floor == slow.exchange > slow.compute


def test_rows_that_fill_up_a_batch_are_computed_too() -> None:
    gpus = parse_gpu("h100:8")
    mesh = {**ONE, "data": 8}
    nine, sixteen = (
        step_time(SEVEN, target=gpus, mesh=mesh, remat="names", **{**STAGE_1, "batch_size": size})
        for size in (9, 16)
    )
    assert nine.compute == sixteen.compute


@pytest.mark.parametrize("target", ["v5p:2x2x1", "v5p:2x2x2", "v6e:2x4"])
def test_weights_are_replicated_where_they_fit(target: str) -> None:
    chosen = choose(SEVEN, parse_tpu(target))
    chips = parse_tpu(target).chips
    assert chosen.sizes == {"data": chips, "fsdp": 1, "tensor": 1}
    assert chosen.fits
    assert "none of them crosses a link" in chosen.reason


@pytest.mark.parametrize("model", [SEVEN, THIRTEEN])
def test_weights_are_split_where_they_do_not_fit_and_the_shortest_step_wins(
    model: ModelConfig,
) -> None:
    target = parse_tpu("v5e:4x4")
    chosen = choose(model, target)
    assert chosen.fits
    assert chosen.fsdp * chosen.tensor > 1
    limit = USABLE * target.device.hbm_bytes
    assert memory(model, mesh=chosen.sizes).total <= limit
    assert memory(model, mesh={**ONE, "data": 16}).total > limit

    def seconds(mesh: dict[str, int]) -> float:
        return step_time(model, target=target, mesh=mesh, remat="names", **STAGE_1).in_turn

    others = [
        {"data": data, "fsdp": fsdp, "tensor": 16 // data // fsdp}
        for data in (1, 2, 4, 8, 16)
        for fsdp in (1, 2, 4, 8, 16)
        if data * fsdp in (2, 4, 8, 16) and 16 // data // fsdp <= 8
    ]
    for other in others:
        if memory(model, mesh=other).total <= limit:
            assert seconds(chosen.sizes) <= seconds(other), other


def test_where_nothing_fits_the_least_is_taken_and_said() -> None:
    chosen = choose(THIRTEEN, parse_tpu("v5e:1x1"))
    assert not chosen.fits
    assert "nothing fits, this needs least" in chosen.reason


def test_what_is_configured_is_what_is_taken() -> None:
    target = parse_tpu("v5p:2x2x2")
    chosen = choose(SEVEN, target, {"data": 2, "fsdp": 2, "tensor": 2})
    assert chosen.sizes == {"data": 2, "fsdp": 2, "tensor": 2}
    assert "as configured" in chosen.reason
    rest = choose(SEVEN, target, {"data": 0, "fsdp": 4, "tensor": 0})
    assert rest.fsdp == 4
    assert rest.data * rest.tensor == 2


def test_a_device_whose_memory_is_not_known_replicates() -> None:
    given = {"remat": "names", **STAGE_1, "batch_size": 8}
    tiny = PRESETS["tiny-qformer"].model
    chosen = pick_mesh(tiny, target=None, chips=8, asked=AUTO, **given)
    assert (chosen.sizes, chosen.fits) == ({"data": 8, "fsdp": 1, "tensor": 1}, True)
    assert "not known" in chosen.reason


@pytest.mark.parametrize(
    ("asked", "batch_size", "said"),
    [
        ({"data": 3, "fsdp": 0, "tensor": 0}, 256, "expected sizes whose product is 8"),
        ({"data": 2, "fsdp": 2, "tensor": 1}, 256, "expected sizes whose product is 8"),
        ({"data": 8, "fsdp": 1, "tensor": 1}, 12, "splits the batch 8 times and data.batch_size"),
        ({"data": 1, "fsdp": 1, "tensor": 8}, 256, "tensor=8 does not divide the 2 kv heads"),
    ],
)
def test_a_mesh_that_cannot_be_had_is_refused(
    asked: dict[str, int], batch_size: int, said: str
) -> None:
    given = {"remat": "names", **STAGE_1, "batch_size": batch_size}
    with pytest.raises(UserError) as caught:
        pick_mesh(PRESETS["tiny"].model, target=None, chips=8, asked=asked, **given)
    assert said in str(caught.value)


def test_a_batch_that_the_devices_do_not_divide_is_split_as_far_as_it_goes() -> None:
    given = {**STAGE_1, "batch_size": 12, "length": 231, "targets": 160}
    chosen = choose(SEVEN, parse_tpu("v5p:2x2x2"), **given)
    assert chosen.sizes == {"data": 4, "fsdp": 1, "tensor": 2}


def test_estimates_are_counted_in_bytes_of_gib_that_fit_on_a_card() -> None:
    # The original's own set-up: 64 pictures a GPU on A100s of 80 GB.
    assert 20 < memory(SEVEN, batch_size=64, vision=True).total / GIB < 35
