"""Which devices share what in a training run, and a process's arrays on all of them.

For: `choose_mesh`, which fills in what `config.mesh` leaves open and says why; `batch_share`, the part of every batch
that this process reads; its rows onto the mesh. Not for: where a weight lies (`sharding.py`), how much memory a step
needs and which mesh that asks for (`estimate.py`).

Differs from the original, which copies everything to every GPU (torch DDP) and stops where that does not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.estimate import pick_mesh
from minigpt4_jax.hardware import RATES_OF, Slice, slice_of, unlisted_slice
from minigpt4_jax.sharding import AXES, ROWS, make_mesh, rows_sharding
from minigpt4_jax.train_config import TrainConfig


class Choice(NamedTuple):
    """A mesh, and in one sentence why it is this one."""

    mesh: Mesh
    reason: str


def choose_mesh(
    config: TrainConfig,
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    devices: Sequence[jax.Device] | None = None,
) -> Choice:
    """The mesh of a run: what `config.mesh` leaves open is chosen as `minigpt4 plan` would (`estimate.pick_mesh`).

    Frozen weights need no gradient: where every device holds them whole, a step exchanges the projection's gradient
    alone (16 MB). So they are whole wherever they fit; where the memory of a device is not known, too.

    Args:
        dtype: of the frozen weights and the activations.
        devices: default: all of the run's. A run of one process whose sizes are all given may use fewer.

    Raises:
        UserError: sizes that do not multiply to the devices, a batch or a model that they do not divide, or weights
            that fit on no mesh.
    """
    devices = list(jax.devices() if devices is None else devices)
    asked = {axis: int(getattr(config.mesh, axis)) for axis in AXES}
    count, used = len(devices), math.prod(asked.values())
    if 0 < used < count and len({device.process_index for device in devices}) == 1:
        devices = devices[:used]
    length, targets = _longest(config, model)
    target = _target(devices)
    try:
        picked = pick_mesh(
            model,
            target=target,
            chips=len(devices),
            asked=asked,
            batch_size=config.data.batch_size,
            length=length,
            targets=targets,
            remat=config.remat,
            dtype_bytes=np.dtype(dtype).itemsize,
            vision=not config.cache_features,
        )
    except UserError as error:
        raise UserError(f"{error}{_fitting_batches(config, len(devices))}") from error
    if not picked.fits and not used:
        raise UserError(
            f"{picked.reason} Lower data.batch_size (and raise optimizer.accum_grad_iters), set remat=full, take more "
            "devices, or give mesh.data, mesh.fsdp and mesh.tensor to try it all the same."
        )
    reason = picked.reason
    if target is not None and not target.device.device_kinds:
        reason += (
            f" The rates of {target.device.name} are not known: those of {RATES_OF} were taken."
        )
    if len(devices) < count:
        reason += f" It uses {len(devices)} of the {count} devices."
    return Choice(make_mesh(**picked.sizes, devices=devices), reason)


def _longest(config: TrainConfig, model: ModelConfig) -> tuple[int, int]:
    """Tokens of a row and its targets that the run's memory is estimated with."""
    data = config.data
    return data.longest_sample(num_image_tokens=model.num_image_tokens), data.max_text_len


def _target(devices: Sequence[jax.Device]) -> Slice | None:
    """What the devices are, with the memory that they report; None for CPUs, and where nobody says how much it is."""
    kind, chips = devices[0].device_kind, len(devices)
    target = slice_of(kind, chips)
    if target is None and devices[0].platform == "cpu":
        return None
    own = [device for device in devices if device.process_index == jax.process_index()]
    reported = min((int((d.memory_stats() or {}).get("bytes_limit", 0)) for d in own), default=0)
    limit = int(agree(np.int32(reported >> 20))) << 20  # in MiB: JAX has no int64
    if not limit:
        return target
    if target is None:
        return unlisted_slice(kind, chips, hbm_bytes=limit)
    device = dataclasses.replace(target.device, hbm_bytes=limit, memory_share=1.0)
    return dataclasses.replace(target, device=device)


def _fitting_batches(config: TrainConfig, count: int) -> str:
    """Words for a batch whose rows the devices cannot share; empty for one that they can."""
    size, rows = config.data.batch_size, max(count // (config.mesh.tensor or 1), 1)
    if size % rows == 0:
        return ""
    fitting = [size // rows * rows] if size > rows else []
    fitting.append(-(-size // rows) * rows)
    return f" A data.batch_size of {' or '.join(map(str, fitting))} would fit."


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and of how many: (0, 1) where it reads it all.

    Processes that hold the same rows (tensor parallelism between hosts) read the same part.

    Raises:
        UserError: the mesh gives processes parts that overlap, differ in size or are not consecutive rows.
    """
    count = math.prod(mesh.shape[axis] for axis in ROWS)
    held: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = rows_sharding(mesh).devices_indices_map((count,))
    for device, (rows, *_) in places.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(count)))
    return shares_of(held, count=count)[jax.process_index()]


def shares_of(held: Mapping[int, Collection[int]], *, count: int) -> dict[int, tuple[int, int]]:
    """Process -> (part, parts), by the rows of `count` that each holds. Raises as `batch_share`."""
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    in_order = [row for part in parts for row in part] == list(range(count))
    if not in_order or len({len(part) for part in parts}) > 1:
        raise UserError(
            f"The processes of this mesh hold the rows {parts} of every {count}; expected equal parts, one after the "
            "other. Choose a mesh.data that is a multiple of the number of hosts."
        )
    return {
        process: (parts.index(tuple(sorted(rows))), len(parts)) for process, rows in held.items()
    }


def place_rows(rows: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch (a tree of NumPy arrays `[its rows, ...]`) as arrays of the whole batch."""
    where = rows_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(where, leaf), rows)


def agree(tree: Any) -> Any:
    """The tree of NumPy arrays that process 0 has: what every process computed for itself may differ in a last bit."""
    host = jax.tree.map(np.asarray, tree)
    return multihost_utils.broadcast_one_to_all(host) if jax.process_count() > 1 else host
