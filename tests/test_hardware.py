"""hardware.py: names are found, slices exist or are refused with the one that was meant, exchange is the corner's."""

from __future__ import annotations

import math

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.hardware import DEVICES, GIB, find_device, parse_gpu, parse_tpu, slice_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
    ],
)
def test_a_device_is_found_by_the_name_that_jax_reports(kind: str, name: str) -> None:
    device = find_device(kind)
    assert device is not None
    assert device.name == name


def test_an_unknown_device_is_none_and_no_guess() -> None:
    assert find_device("cpu") is None
    assert find_device("NVIDIA GH200 480GB") is None
    assert slice_of("cpu", 8) is None


@pytest.mark.parametrize("name", DEVICES)
def test_the_numbers_of_a_device_are_in_their_units(name: str) -> None:
    device = DEVICES[name]
    assert 16 * GIB <= device.hbm_bytes <= 150e9
    assert 100e12 < device.flops_per_s < 1000e12
    # Every one of these chips multiplies 130 to 600 times for a byte that it reads.
    assert 130 < device.flops_per_s / device.hbm_bytes_per_s < 600
    assert device.host_bytes_per_s < device.link_bytes_per_s < device.hbm_bytes_per_s


@pytest.mark.parametrize(
    ("text", "chips", "hosts"),
    [
        ("v5e:4x4", 16, 4),
        ("v4:2x2x1", 4, 1),
        ("v5p:2x2x2", 8, 2),
        ("V6E:2x4", 8, 1),
        ("v6e:16x16", 256, 64),
        ("v5p:4x4x8", 128, 32),
    ],
)
def test_a_slice_has_its_chips_and_hosts(text: str, chips: int, hosts: int) -> None:
    found = parse_tpu(text)
    assert (found.chips, found.hosts, found.name) == (chips, hosts, text.lower())


def test_a_run_finds_the_slice_that_it_is_on() -> None:
    found = slice_of("TPU v5 lite", 16)
    assert found is not None
    assert found.name == "v5e:4x4"
    eight = slice_of("TPU v5p", 8)
    assert eight is not None
    assert eight.name == "v5p:2x2x2"


def test_a_number_of_chips_that_no_slice_has_counts_as_a_line() -> None:
    found = slice_of("TPU v5 lite", 3)
    assert found is not None
    assert (found.topology, found.exchange_bytes_per_s(3)) == ((3,), 50e9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v7:4x4", "expected one of v4, v5e, v5p, v6e, a colon and the sides of a slice"),
        ("v5:2x2x1", "Did you mean v5e:2x4 or v5p:2x2x4?"),
        ("v5e", "expected the sides of a slice behind the colon, such as v5e:2x4."),
        ("v5e:16", "v5e-16 is v5e:4x4."),
        ("v5e-16", "v5e-16 is v5e:4x4."),
        ("v5p-8", "v5p-8 is v5p:2x2x1."),
        ("v5e:4*4", "expected the sides of a slice"),
        ("v5e:4x2", "The closest is v5e:2x4."),
        ("v5e:3x5", "The closest is v5e:4x4."),
        ("v5e:2x2x2", "There is no slice 'v5e:2x2x2'; expected one of 1x1, 2x2, 2x4"),
        ("v4:2x2", "The closest is v4:2x2x1."),
        ("v5p:4x4x6", "The closest is v5p:4x4x4."),
        ("h100:8", "expected --gpu h100:8"),
    ],
)
def test_a_slice_that_there_is_not_is_refused_with_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_tpu(text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a100:4", "Did you mean a100-40:4 or a100-80:4 or a100-40-pcie:4 or a100-80-pcie:4?"),
        ("h100", "such as h100:4."),
        ("h100:x", "such as h100:4."),
        ("h100:0", "such as h100:4."),
        ("h100:12", "whole hosts of 8, such as h100:16."),
        ("v5e:4x4", "expected --tpu v5e:4x4"),
        (
            "rtx4090:1",
            "expected one of a100-40, a100-80, a100-40-pcie, a100-80-pcie, h100, h100-pcie, h100-nvl, h200",
        ),
    ],
)
def test_gpus_that_there_are_not_are_refused_with_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_gpu(text)
    assert said in str(caught.value)


def test_the_chip_with_the_fewest_links_decides_how_fast_an_exchange_is() -> None:
    flat = parse_tpu("v5e:2x4")
    assert flat.exchange_bytes_per_s(4) == 50e9  # along the longer side
    assert flat.exchange_bytes_per_s(8) == 100e9  # a corner has two links
    assert parse_tpu("v5e:16x16").exchange_bytes_per_s(256) == 200e9  # both sides are rings
    assert parse_tpu("v5p:2x2x2").exchange_bytes_per_s(8) == 300e9
    assert parse_tpu("v5p:4x4x4").exchange_bytes_per_s(64) == 600e9


def test_gpus_exchange_through_their_switch_within_a_host_and_the_network_beyond() -> None:
    hosts = parse_gpu("h100:16")
    assert hosts.exchange_bytes_per_s(8) == 450e9
    assert hosts.exchange_bytes_per_s(16) == 50e9
    assert hosts.hosts == 2


def test_every_slice_of_the_table_can_be_typed() -> None:
    for device in DEVICES.values():
        for topology in device.topologies:
            text = f"{device.name}:{'x'.join(map(str, topology))}"
            assert parse_tpu(text).chips == math.prod(topology)
