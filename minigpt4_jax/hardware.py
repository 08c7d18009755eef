"""Accelerators as their makers state them: memory, peak rates, links; and the slices and hosts they are rented in.

For: `DEVICES`, `find_device` (by the name that JAX reports) and `parse_tpu`, `parse_gpu` (by what a person types). Not
for: what a model needs of them (`estimate.py`), and not for asking the device at hand: nothing here imports JAX.

Every number has its source beside it. "Unverified" is from memory: no page at hand says so. Rates are peaks that no
program reaches; GB is 1e9 bytes and GiB 2**30.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace

from minigpt4_jax.config import UserError

GIB = 2**30
GPU_SHARE = 0.95
"""Of a GPU's memory, what JAX's allocator is given (`gpu_memory.py`; 0.75 where nobody says). The rest is for what does
not ask that allocator: the driver, cuBLAS, cuDNN, NCCL."""
TPU_CHIPS_PER_HOST = 4
"""Of slices that one host does not hold. https://docs.cloud.google.com/tpu/docs/v5e, VM types: a VM of v5litepod-16 and
larger has four chips (that page's table of topologies counts machines, which hold two such VMs); the same for v6e."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One chip. Rates are per second."""

    name: str
    """As it is typed behind `--tpu` or `--gpu`."""
    device_kinds: tuple[str, ...]
    """`jax.Device.device_kind` begins with one of these."""
    hbm_bytes: int
    """Memory; on GPUs what the driver reports, which is less than what is printed on the box."""
    flops_per_s: float
    """bfloat16 matrix products, dense."""
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """In one direction: of one link to a neighbouring TPU chip, or of a GPU's NVLink altogether."""
    host_bytes_per_s: float
    """In one direction and per chip, from one host to another outside a slice's own links."""
    chips_per_host: int
    """At most: `Slice.hosts`."""
    topologies: tuple[tuple[int, ...], ...]
    """Slices that can be rented; empty for GPUs, which come in any number."""
    memory_share: float = 1.0
    """Of `hbm_bytes`, what JAX's allocator gets."""

    @property
    def memory_bytes(self) -> int:
        """What arrays and programs share."""
        return int(self.memory_share * self.hbm_bytes)

    @property
    def is_tpu(self) -> bool:
        return bool(self.topologies)


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""https://cloud.google.com/tpu/docs/v5e, the same for v6e."""


def _cubes(largest: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    """Slices of a 3D pod: parts of a cube of 4 x 4 x 4, and whole cubes with the sides in ascending order."""
    sides = [range(4, most + 1, 4) for most in largest]
    whole = [(a, b, c) for a in sides[0] for b in sides[1] for c in sides[2] if a <= b <= c]
    return ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *whole)


def _pcie_card(name: str, kind: str, gib: float, *, rates: tuple[float, float, float]) -> Device:
    """`rates` of matrix products, memory and bus. NVLink joins pairs of such cards at most, so the bus counts. GiB that
    the driver reports, eight a host and 100 Gb/s each are unverified."""
    return Device(
        name=name,
        device_kinds=(kind,),
        hbm_bytes=int(gib * GIB),
        flops_per_s=rates[0],
        hbm_bytes_per_s=rates[1],
        link_bytes_per_s=rates[2],
        host_bytes_per_s=12.5e9,
        chips_per_host=8,
        topologies=(),
        memory_share=GPU_SHARE,
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="v4",
            device_kinds=("TPU v4",),
            # https://docs.cloud.google.com/tpu/docs/v4: 32 GiB, 1200 GBps, 275 TFLOP/s, 4 chips a host, 4096 a pod.
            hbm_bytes=32 * GIB,
            flops_per_s=275e12,
            hbm_bytes_per_s=1200e9,
            link_bytes_per_s=50e9,  # six links; unverified
            host_bytes_per_s=6.25e9,  # unverified
            chips_per_host=4,
            topologies=_cubes((12, 16, 24)),
        ),
        Device(
            name="v5e",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            # https://docs.cloud.google.com/tpu/docs/v5e: 16 GB, 800 GiBps (819 GBps in the page's older form), 197
            # TFLOP/s, 400 GBps both ways over four links, two NICs of 100 Gbps for a host's eight chips.
            hbm_bytes=16 * GIB,
            flops_per_s=197e12,
            hbm_bytes_per_s=819e9,
            link_bytes_per_s=50e9,
            host_bytes_per_s=3.125e9,
            chips_per_host=8,
            topologies=_FLAT,
        ),
        Device(
            name="v5p",
            device_kinds=("TPU v5p", "TPU v5"),
            # https://docs.cloud.google.com/tpu/docs/v5p-training: 95 GB, 2765 GBps, 459 TFLOP/s, 1200 GBps both ways
            # over six links, 4 chips a host, up to 16x16x24.
            hbm_bytes=95 * GIB,
            flops_per_s=459e12,
            hbm_bytes_per_s=2765e9,
            link_bytes_per_s=100e9,
            host_bytes_per_s=6.25e9,  # unverified
            chips_per_host=4,
            topologies=_cubes((16, 16, 24)),
        ),
        Device(
            name="v6e",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            # https://docs.cloud.google.com/tpu/docs/v6e: 32 GB, 1638 GBps, 918 TFLOP/s, 800 GBps both ways over four
            # links, 8 chips a host.
            hbm_bytes=32 * GIB,
            flops_per_s=918e12,
            hbm_bytes_per_s=1638e9,
            link_bytes_per_s=100e9,
            host_bytes_per_s=12.5e9,  # unverified
            chips_per_host=8,
            topologies=_FLAT,
        ),
        Device(
            name="a100-40",
            device_kinds=("NVIDIA A100-SXM4-40GB",),
            # NVIDIA A100 data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4): 312 TFLOP/s, 1555 GB/s, NVLink 600
            # GB/s both ways. The driver reports 39.5 GiB. Eight a host with 200 Gb/s each (DGX A100), unverified.
            hbm_bytes=int(39.5 * GIB),
            flops_per_s=312e12,
            hbm_bytes_per_s=1555e9,
            link_bytes_per_s=300e9,
            host_bytes_per_s=25e9,
            chips_per_host=8,
            topologies=(),
            memory_share=GPU_SHARE,
        ),
        Device(
            name="a100-80",
            device_kinds=("NVIDIA A100-SXM4-80GB",),
            # The same data sheet: 2039 GB/s. 79 GiB reported, unverified.
            hbm_bytes=79 * GIB,
            flops_per_s=312e12,
            hbm_bytes_per_s=2039e9,
            link_bytes_per_s=300e9,
            host_bytes_per_s=25e9,
            chips_per_host=8,
            topologies=(),
            memory_share=GPU_SHARE,
        ),
        # The same data sheet's PCIe cards: 312 TFLOP/s, 1555 and 1935 GB/s, PCIe 4.0 with 64 GB/s both ways.
        _pcie_card("a100-40-pcie", "NVIDIA A100-PCIE-40GB", 39.4, rates=(312e12, 1555e9, 32e9)),
        _pcie_card("a100-80-pcie", "NVIDIA A100 80GB PCIe", 79.0, rates=(312e12, 1935e9, 32e9)),
        Device(
            name="h100",
            device_kinds=("NVIDIA H100 80GB HBM3",),
            # NVIDIA H100 data sheet, SXM5: 989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways. 79 GiB reported,
            # unverified. Eight a host with 400 Gb/s each (DGX H100), unverified.
            hbm_bytes=79 * GIB,
            flops_per_s=989e12,
            hbm_bytes_per_s=3350e9,
            link_bytes_per_s=450e9,
            host_bytes_per_s=50e9,
            chips_per_host=8,
            topologies=(),
            memory_share=GPU_SHARE,
        ),
        # The same data sheet: PCIe 80 GB, 756 TFLOP/s, 2 TB/s; NVL 94 GB, 835 TFLOP/s (unverified), 3.9 TB/s; both PCIe
        # 5.0 with 128 GB/s both ways.
        _pcie_card("h100-pcie", "NVIDIA H100 PCIe", 79.0, rates=(756e12, 2000e9, 64e9)),
        _pcie_card("h100-nvl", "NVIDIA H100 NVL", 93.1, rates=(835e12, 3900e9, 64e9)),
        Device(
            name="h200",
            device_kinds=("NVIDIA H200",),
            # As H100 with 141 GB at 4.8 TB/s; mlcommons/inference_results_v4.1, H200-SXM-141GBx8: eight a host, 18 x
            # 4th Gen NVLink, 900 GB/s, 400 Gb/s each. 139 GiB seen on one.
            hbm_bytes=139 * GIB,
            flops_per_s=989e12,
            hbm_bytes_per_s=4800e9,
            link_bytes_per_s=450e9,
            host_bytes_per_s=50e9,
            chips_per_host=8,
            topologies=(),
            memory_share=GPU_SHARE,
        ),
    )
}

RATES_OF = "a100-40-pcie"


def find_device(device_kind: str) -> Device | None:
    """The accelerator that JAX calls so, or None: a CPU, or one that is not in the table."""
    fitting = [
        (len(kind), device)
        for device in DEVICES.values()
        for kind in device.device_kinds
        if device_kind.startswith(kind)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def slice_of(device_kind: str, chips: int) -> Slice | None:
    """What a program runs on that sees so many devices of a kind: the slice of that size whose sides are most alike.

    None for a kind that `find_device` does not know. A number of chips that no slice has counts as a line of them.
    """
    device = find_device(device_kind)
    if device is None:
        return None
    fitting = [topology for topology in device.topologies if math.prod(topology) == chips]
    return Slice(device=device, topology=min(fitting, key=max, default=(chips,)))


def unlisted_slice(device_kind: str, chips: int, *, hbm_bytes: int) -> Slice:
    """Devices that `find_device` does not know and that report their memory: at the rates of `RATES_OF`, whose links
    are the slowest of the table, so that what is chosen by them exchanges little."""
    known = DEVICES[RATES_OF]
    device = replace(
        known, name=device_kind, device_kinds=(), hbm_bytes=hbm_bytes, memory_share=1.0
    )
    return Slice(device=device, topology=(chips,))


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips that train together."""

    device: Device
    topology: tuple[int, ...]
    """Chips along each side; of GPUs their number."""

    @property
    def name(self) -> str:
        """As it is typed: `v5e:4x4`, `a100-80:4`."""
        return f"{self.device.name}:{'x'.join(map(str, self.topology))}"

    @property
    def chips(self) -> int:
        return math.prod(self.topology)

    @property
    def hosts(self) -> int:
        """Machines as programs see them, a process on each."""
        each = self.device.chips_per_host
        if self.device.is_tpu and self.chips > each:
            each = TPU_CHIPS_PER_HOST
        return -(-self.chips // each)

    def exchange_bytes_per_s(self, span: int) -> float:
        """What each of `span` neighbouring chips can take in at best while all of them exchange.

        Of TPUs the chip with the fewest links decides: a corner has one along each side of the slice, two where the
        side closes to a ring (16 chips of v5e and v6e; every side of whole cubes). A group takes the longest sides
        first. GPUs have one switch in a host; groups that are larger than that go through its network cards.
        """
        device = self.device
        if not device.is_tpu:
            return (
                device.link_bytes_per_s
                if span <= device.chips_per_host
                else device.host_bytes_per_s
            )
        links, taken = 0, 1
        for side in sorted(self.topology, reverse=True):
            if taken >= span or side == 1:
                break
            links += 2 if self.closes(side) else 1
            taken *= side
        return max(links, 1) * device.link_bytes_per_s

    def closes(self, side: int) -> bool:
        """Whether the chips along a side of this length form a ring."""
        if len(self.topology) == 3:
            return all(each % 4 == 0 for each in self.topology)
        return len(self.topology) == 2 and side == 16


def parse_tpu(text: str) -> Slice:
    """`v5e:4x4` and the like. Raises `UserError` for a chip or a slice that there is not, with the closest one."""
    device, shape = _split(text, tpu=True)
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"--tpu is {text!r}; expected the sides of a slice behind the colon, such as {_example(device)}."
            f"{_by_number(device, shape)}"
        )
    topology = tuple(int(side) for side in shape.split("x"))
    if topology not in device.topologies:
        size = math.prod(topology)
        sorted_sides = next((t for t in device.topologies if sorted(t) == sorted(topology)), None)
        close = sorted_sides or min(
            device.topologies, key=lambda t: (abs(math.prod(t) - size), len(t))
        )
        known = ", ".join("x".join(map(str, t)) for t in device.topologies[:8])
        raise UserError(
            f"There is no slice {text!r}; expected one of {known}{', ...' if len(device.topologies) > 8 else ''} "
            f"for {device.name}. The closest is {device.name}:{'x'.join(map(str, close))}."
        )
    return Slice(device=device, topology=topology)


def parse_gpu(text: str) -> Slice:
    """`a100-80:4` and the like. Raises `UserError` for a GPU that is not in the table, or no number of them."""
    device, number = _split(text, tpu=False)
    if not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"--gpu is {text!r}; expected how many behind the colon, such as {_example(device)}."
        )
    chips = int(number)
    if chips > device.chips_per_host and chips % device.chips_per_host:
        each = device.chips_per_host
        raise UserError(
            f"--gpu is {text!r}; expected up to {each} on one host, or whole hosts of {each}, such as "
            f"{device.name}:{-(-chips // each) * each}."
        )
    return Slice(device=device, topology=(chips,))


def _split(text: str, *, tpu: bool) -> tuple[Device, str]:
    name, _, rest = text.strip().lower().partition(":")
    option, other = ("--tpu", "--gpu") if tpu else ("--gpu", "--tpu")
    known = [device.name for device in DEVICES.values() if device.is_tpu == tpu]
    if name in DEVICES and name not in known:
        raise UserError(f"{option} is {text!r}; expected {other} {text} for that chip.")
    if name not in DEVICES:
        base = next((each for each in known if name.startswith(f"{each}-")), None)
        if base is not None:
            device = DEVICES[base]
            hint = _by_number(device, name.removeprefix(f"{base}-"))
            raise UserError(
                f"{option} is {text!r}; expected a form such as {_example(device)}.{hint}"
            )
        begun = [each for each in known if name and each.startswith(name)]
        meant = begun or difflib.get_close_matches(name, known, n=1)
        forms = " or ".join(_example(DEVICES[each]) for each in meant)
        hint = f" Did you mean {forms}?" if forms else ""
        raise UserError(
            f"{option} is {text!r}; expected one of {', '.join(known)}, a colon and "
            f"{'the sides of a slice' if tpu else 'how many'}.{hint}"
        )
    return DEVICES[name], rest


def _example(device: Device) -> str:
    return f"{device.name}:{'x'.join(map(str, device.topologies[2])) if device.is_tpu else 4}"


def _by_number(device: Device, text: str) -> str:
    """What `v5e-8` or `v5p-8` would be: v4 and v5p count TensorCores in such names, two a chip."""
    if not device.is_tpu or not text.isdecimal():
        return ""
    cores = 2 if len(device.topologies[0]) == 3 else 1
    for topology in device.topologies:
        if math.prod(topology) * cores == int(text):
            return f" {device.name}-{text} is {device.name}:{'x'.join(map(str, topology))}."
    return ""
