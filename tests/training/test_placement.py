"""training/placement.py: the mesh is the one that plan names, or the error says what would fit."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from minigpt4_jax.config import UserError
from minigpt4_jax.estimate import USABLE
from minigpt4_jax.hardware import GIB, Slice, parse_tpu
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.sharding import make_mesh
from minigpt4_jax.train_config import DataConfig, MeshConfig, TrainConfig
from minigpt4_jax.training import placement
from minigpt4_jax.training.placement import batch_share, choose_mesh, place_rows, shares_of

MODEL = dataclasses.replace(
    PRESETS["tiny"].model,
    llama=dataclasses.replace(PRESETS["tiny"].model.llama, num_heads=8, num_kv_heads=8),
)


def run(*, batch_size: int = 16, **sizes: int) -> TrainConfig:
    return TrainConfig(mesh=MeshConfig(**sizes), data=DataConfig(batch_size=batch_size))


def sizes_of(config: TrainConfig, **settings: Any) -> tuple[dict[str, int], str]:
    mesh, reason = choose_mesh(config, MODEL, dtype=jnp.float32, **settings)
    return dict(mesh.shape), reason


def test_where_memory_is_not_known_the_weights_are_whole_and_the_reason_says_so() -> None:
    shape, reason = sizes_of(run())
    assert shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert "memory of this device is not known" in reason


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"fsdp": 4}, {"data": 2, "fsdp": 4, "tensor": 1}),
        ({"data": 1, "tensor": 1}, {"data": 1, "fsdp": 8, "tensor": 1}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_sizes_that_are_given_are_kept(given: Any, expected: dict[str, int]) -> None:
    assert sizes_of(run(**given))[0] == expected


def test_fewer_devices_than_there_are_can_be_asked_for_and_that_is_said() -> None:
    config = run(data=2, fsdp=1, tensor=1)
    mesh, reason = choose_mesh(config, MODEL, dtype=jnp.float32)
    assert list(mesh.devices.flat) == jax.devices()[:2]
    assert "It uses 2 of the 8 devices" in reason


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 4, "fsdp": 4, "tensor": 1}], ids=str)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes: Any) -> None:
    with pytest.raises(UserError, match="on 8 devices; expected sizes whose product is 8"):
        sizes_of(run(**sizes))


def test_a_batch_that_the_devices_cannot_share_is_refused_with_sizes_that_fit() -> None:
    with pytest.raises(UserError, match=r"data.batch_size is 12.* of 8 or 16 would fit"):
        sizes_of(run(batch_size=12, tensor=1))
    with pytest.raises(UserError, match=r"data.batch_size is 3\b.* of 4 would fit"):
        sizes_of(run(batch_size=3, data=2, fsdp=2, tensor=2))


def small(target: Slice, num_bytes: int) -> Slice:
    return dataclasses.replace(
        target, device=dataclasses.replace(target.device, hbm_bytes=num_bytes)
    )


@pytest.mark.parametrize(
    ("kind", "name", "reported", "whole"),
    [
        ("NVIDIA H100 NVL", "h100-nvl", 16 * 2**30, True),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB", 16 * 2**30, True),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB", 700_000_000, False),
    ],
)
def test_the_memory_that_a_gpu_reports_is_the_limit_whether_or_not_the_table_has_it(
    kind: str, name: str, reported: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Mock(spec=jax.devices()[0], device_kind=kind, platform="gpu", process_index=0)
    gpu.memory_stats.return_value = {"bytes_limit": reported}

    def on_cpus(devices: Any, **sizes: int) -> Mesh:
        return make_mesh(**sizes, devices=jax.devices())

    monkeypatch.setattr(placement, "make_mesh", on_cpus)
    smol = PRESETS["smol"].model  # 540 MB of weights in float32
    mesh, reason = choose_mesh(run(batch_size=8), smol, dtype=jnp.float32, devices=[gpu] * 8)
    assert (mesh.shape["data"] == 8) == whole
    limit = USABLE * (reported >> 20 << 20) / GIB
    assert f"of {limit:.1f} GiB on each of 8 {name}" in reason
    assert ("The rates of NVIDIA GH200 480GB are not known" in reason) == (name == kind)


@pytest.mark.parametrize(
    ("hbm_bytes", "whole"), [(16 * 2**30, True), (700_000_000, False)], ids=["large", "small"]
)
def test_weights_are_whole_where_they_fit_and_shared_where_they_do_not(
    hbm_bytes: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = small(parse_tpu("v5e:2x4"), hbm_bytes)
    asked: list[tuple[str, int]] = []

    def known(kind: str, chips: int) -> Slice:
        asked.append((kind, chips))
        return target

    monkeypatch.setattr(placement, "slice_of", known)
    smol = PRESETS["smol"].model  # 540 MB of weights in float32
    mesh, reason = choose_mesh(run(batch_size=8), smol, dtype=jnp.float32)
    assert (mesh.shape["data"] == 8) == whole
    assert asked == [(jax.devices()[0].device_kind, 8)]
    assert ("the whole frozen weights fit" in reason) == whole


def test_what_fits_nowhere_is_refused_unless_a_person_gives_the_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = small(parse_tpu("v5e:2x4"), 1000)
    monkeypatch.setattr(placement, "slice_of", lambda kind, chips: target)
    with pytest.raises(UserError, match=r"nothing fits.*Lower data.batch_size"):
        sizes_of(run())
    assert sizes_of(run(data=1, fsdp=8, tensor=1))[0]["fsdp"] == 8


# --- a process's rows -------------------------------------------------------------------------------------------------


def test_one_process_reads_the_whole_batch() -> None:
    assert batch_share(make_mesh(data=2, fsdp=2, tensor=2)) == (0, 1)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({0: {0, 1}, 1: {2, 3}}, {0: (0, 2), 1: (1, 2)}),
        # Tensor parallelism between the hosts of a pair: both read the same rows.
        (
            {0: {0, 1}, 1: {0, 1}, 2: {2, 3}, 3: {2, 3}},
            {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)},
        ),
        ({5: {2, 3}, 7: {0, 1}}, {5: (1, 2), 7: (0, 2)}),
    ],
)
def test_processes_read_the_rows_of_their_devices(held: Any, expected: Any) -> None:
    assert shares_of(held, count=4) == expected


@pytest.mark.parametrize(
    "held", [{0: {0, 2}, 1: {1, 3}}, {0: {0}, 1: {1, 2, 3}}, {0: {0, 1}, 1: {1, 2, 3}}], ids=str
)
def test_rows_that_processes_cannot_read_in_order_are_refused(held: Any) -> None:
    with pytest.raises(UserError, match="multiple of the number of hosts"):
        shares_of(held, count=4)


def test_rows_lie_over_data_and_fsdp_and_are_the_same_along_tensor() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    placed = place_rows(rows, mesh)
    np.testing.assert_array_equal(np.asarray(placed), rows)
    for shard in placed.addressable_shards:
        data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(np.asarray(shard.data), rows[first : first + 2])
