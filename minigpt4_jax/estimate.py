"""What a train step needs, by arithmetic on the sizes: memory, FLOPs, exchange between devices, and the time they take
at least; and which mesh that asks for.

For: `minigpt4 plan`, the mesh that training chooses (`pick_mesh`: one decision for both) and model-FLOP utilisation.
Not for: measuring; nothing here imports JAX or looks at a device. docs/plan.md has the formulas beside the numbers of
the TPU compiler for the same programs.

Only the projection is trained: no input of a frozen product is kept for the backward pass, and no gradient of a frozen
weight is ever exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minigpt4_jax.config import LlamaConfig, ModelConfig, UserError
from minigpt4_jax.exchange import step_exchange
from minigpt4_jax.flops import StepFlops as StepFlops
from minigpt4_jax.flops import step_flops as step_flops
from minigpt4_jax.hardware import GIB, Slice
from minigpt4_jax.parameters import count_parameters, layer_kernels

USABLE = 0.92
"""Share of what JAX's allocator gets of a device's memory (`Device.memory_bytes`) that a step may be planned to fill:
the rest is the runtime's, and what fragments."""
NONE_KEEPS = 2.8
"""What XLA keeps of a layer with remat=none, as a multiple of remat=names. This and the next two are fitted to what
XLA:TPU needs for the 7B step, 64 rows of 65 tokens with 32 targets on v5p; docs/plan.md has how well they do."""
LAYER_BYTES = {"none": 40, "names": 40, "full": 20}
"""Of each token and column of the MLP, what a layer's backward pass makes and drops, float32 for the most part."""
LOGIT_BYTES = 14, 20
"""Of each logit of a target: on whole weights, and where the LM head is split, so that parts are summed."""
OPTIMIZER_BYTES = 16
"""Per trained number: itself, its gradient and AdamW's two moments, float32."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: int
    """The frozen language model."""
    activations: int
    """What the forward pass keeps of every layer for the backward pass."""
    layer: int
    """The layer at work: weights gathered from other devices, and what is made and dropped within it."""
    optimizer: int
    """The projection, its gradient and the optimizer's moments."""
    logits: int
    """Of the targets: themselves, their softmax and their gradients. Never at the same time as a layer's work."""
    vision: int
    """The image tower, the Q-Former and what they make on the way; 0 with cached features."""

    @property
    def total(self) -> int:
        """The most that there is at any time."""
        parts: list[int] = list(asdict(self).values())
        return sum(parts) - min(self.layer, self.logits)


def train_memory(
    model: ModelConfig,
    *,
    mesh: Mapping[str, int],
    batch_size: int,
    length: int,
    targets: int,
    remat: str,
    dtype_bytes: int,
    vision: bool,
) -> MemoryEstimate:
    """Memory of one device while a step runs.

    Args:
        mesh: sizes of `data`, `fsdp` and `tensor`.
        batch_size: samples of one step on all devices together.
        length: tokens of a sample, padding too.
        targets: positions of a sample whose logits are computed.
        remat: as in `TrainConfig`.
        dtype_bytes: of a frozen number and an activation: 2 or 4.
        vision: whether the image tower runs in the loop.
    """
    llama, tensor = model.llama, mesh["tensor"]
    rows = -(-batch_size // (mesh["data"] * mesh["fsdp"]))
    tokens, counts = rows * length, count_parameters(model)
    gathered = head = 0
    if mesh["fsdp"] * tensor > 1:
        head = llama.vocab_size * llama.width * dtype_bytes
    if mesh["fsdp"] > 1:
        gathered = layer_kernels(llama) // tensor * dtype_bytes
    made = tokens * LAYER_BYTES[remat] * llama.mlp_width // tensor
    return MemoryEstimate(
        weights=counts["llama"].on_device(mesh) * dtype_bytes,
        activations=(
            tokens * llama.num_layers * saved_elements(llama, remat, tensor=tensor) * dtype_bytes
        ),
        layer=gathered + made,
        optimizer=counts["llama_proj"].total * OPTIMIZER_BYTES,
        logits=rows * targets * llama.vocab_size * LOGIT_BYTES[head > 0] + head,
        vision=_vision_bytes(model, rows=rows, dtype_bytes=dtype_bytes) if vision else 0,
    )


def saved_elements(llama: LlamaConfig, remat: str, *, tensor: int) -> int:
    """Numbers that a layer keeps of a token for its backward pass.

    remat=names keeps the layer's input, q, k, v, the stream between its halves, gate and up (`models.layers.KEPT`):
    5 D + 2 F with as many kv heads as heads. `tensor` splits all but the residual stream.
    """
    heads = (llama.num_heads + 2 * llama.num_kv_heads) * llama.head_dim
    names = 2 * llama.width + (heads + 2 * llama.mlp_width) // tensor
    return {"names": names, "full": llama.width, "none": round(NONE_KEEPS * names)}[remat]


def _vision_bytes(model: ModelConfig, *, rows: int, dtype_bytes: int) -> int:
    """As `training/vision.py` has it: the whole tower on every device, which encodes the pictures of its rows."""
    counts, vit = count_parameters(model), model.vit
    weights = sum(counts[part].total for part in model.vision_parts) * dtype_bytes
    tokens = rows * (1 + vit.num_patches)
    # The residual stream, q, k, v, the MLP's middle; scores in float32.
    made = tokens * (4 * vit.width + 2 * vit.mlp_width) * dtype_bytes
    scores = rows * vit.num_heads * (1 + vit.num_patches) ** 2 * 4
    return weights + made + scores


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds that a step takes at least, were each of the three the only limit."""

    compute: float
    """Hardware FLOPs at the peak rate."""
    memory: float
    """Weights read for each pass, activations written and read."""
    exchange: float
    """At the rate of the links."""

    @property
    def floor(self) -> float:
        """All three at once, perfectly hidden behind the longest."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def in_turn(self) -> float:
        """Nothing of the exchange hidden: what meshes are compared by."""
        return max(self.compute, self.memory) + self.exchange


def step_time(
    model: ModelConfig,
    *,
    target: Slice,
    mesh: Mapping[str, int],
    batch_size: int,
    length: int,
    targets: int,
    remat: str,
    dtype_bytes: int,
    vision: bool,
) -> StepTime:
    """The least a step can take on `target`; the other arguments are those of `train_memory`.

    Rows of the batch that no device has a whole share of are computed all the same, as padding. Every device that has a
    row encodes its picture, so `tensor` makes the image tower no faster.
    """
    device, copies = target.device, mesh["data"] * mesh["fsdp"]
    flops = step_flops(
        model,
        batch_size=-(-batch_size // copies) * copies,
        length=length,
        targets=targets,
        vision=vision,
        remat=remat,
        tensor=mesh["tensor"],
    )
    need = train_memory(
        model,
        mesh=mesh,
        batch_size=batch_size,
        length=length,
        targets=targets,
        remat=remat,
        dtype_bytes=dtype_bytes,
        vision=vision,
    )
    moved = step_exchange(
        model,
        mesh=mesh,
        batch_size=batch_size,
        length=length,
        targets=targets,
        dtype_bytes=dtype_bytes,
    )
    counts = count_parameters(model)
    passes = 3 if remat == "full" else 2
    read = passes * counts["llama"].total * dtype_bytes / mesh["tensor"]
    if vision:
        read += sum(counts[part].total for part in model.vision_parts) * dtype_bytes
    rate = target.exchange_bytes_per_s
    return StepTime(
        compute=flops.hardware / target.chips / device.flops_per_s,
        memory=(read + 2 * need.activations) / device.hbm_bytes_per_s,
        exchange=(
            moved.tensor / rate(mesh["tensor"])
            + moved.fsdp / rate(mesh["tensor"] * mesh["fsdp"])
            + moved.gradient / rate(target.chips)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class MeshChoice:
    """Sizes of a mesh, and why these."""

    data: int
    fsdp: int
    tensor: int
    fits: bool
    """By the estimate, on a device whose memory is known; True where it is not."""
    reason: str
    """A sentence for people."""

    @property
    def sizes(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


UNKNOWN = (
    "the memory of this device is not known, so weights are replicated as far as the mesh allows"
)


def pick_mesh(
    model: ModelConfig,
    *,
    target: Slice | None,
    chips: int,
    asked: Mapping[str, int],
    batch_size: int,
    length: int,
    targets: int,
    remat: str,
    dtype_bytes: int,
    vision: bool,
) -> MeshChoice:
    """The mesh that a run on `chips` devices gets: the sizes that were asked for, the rest chosen.

    Of the meshes whose step fits into memory it is the one with the shortest step (`StepTime.in_turn`), so weights are
    replicated wherever they fit: nothing is then exchanged but the projection's gradient. Among equals, more `data`.

    Args:
        target: what they are; None where that is unknown (a CPU): weights are then replicated unless asked otherwise.
        asked: `data`, `fsdp` and `tensor`, 0 for a size to be chosen (`MeshConfig`).
        batch_size: and the following as in `train_memory`.

    Raises:
        UserError: sizes that cannot be had: not as many devices, or not dividing batch, heads or widths. Where nothing
            fits into memory there is no error: `fits` is False, and the mesh the one that needs least.
    """
    possible = _possible(model, chips, asked, batch_size)
    configured = min(asked.values()) > 0
    if target is None:
        why = "as configured" if configured else UNKNOWN
        return MeshChoice(**possible[0], fits=True, reason=f"{_named(possible[0])}: {why}.")
    work: dict[str, Any] = {
        "batch_size": batch_size,
        "length": length,
        "targets": targets,
        "remat": remat,
        "dtype_bytes": dtype_bytes,
        "vision": vision,
    }

    def need(mesh: Mapping[str, int]) -> int:
        return train_memory(model, mesh=mesh, **work).total

    def seconds(mesh: Mapping[str, int]) -> float:
        return step_time(model, target=target, mesh=mesh, **work).in_turn

    limit = USABLE * target.device.memory_bytes
    fitting = [mesh for mesh in possible if need(mesh) <= limit]
    chosen = min(fitting, key=seconds) if fitting else min(possible, key=need)
    each = (
        f"{need(chosen) / GIB:.1f} of {limit / GIB:.1f} GiB on each of {chips} {target.device.name}"
    )
    if configured:
        why = "as configured"
    elif not fitting:
        why = "nothing fits, this needs least"
    else:
        whole = need({"data": chips, "fsdp": 1, "tensor": 1})
        why = _why(chosen, fitting=len(fitting), whole=whole)
    return MeshChoice(**chosen, fits=bool(fitting), reason=f"{_named(chosen)}: {why}; {each}.")


def _why(chosen: Mapping[str, int], *, fitting: int, whole: int) -> str:
    """Why this one of the meshes that fit; `whole` is what whole weights would need, in bytes."""
    if chosen["fsdp"] == chosen["tensor"] == 1:
        return "the whole frozen weights fit, and none of them crosses a link"
    among = (
        f"of {fitting} meshes that fit this has the shortest step"
        if fitting > 1
        else "only this mesh fits"
    )
    return f"whole weights would need {whole / GIB:.1f} GiB; {among}"


def _possible(
    model: ModelConfig, chips: int, asked: Mapping[str, int], batch_size: int
) -> list[dict[str, int]]:
    """The meshes of so many devices that are as asked and can be used; raises as `pick_mesh`."""
    said = " ".join(f"{name}={asked[name]}" for name in ("data", "fsdp", "tensor"))
    meshes = [mesh for mesh in _meshes(chips) if _as_asked(mesh, asked)]
    if not meshes:
        raise UserError(
            f"The mesh is {said} on {chips} devices; expected sizes whose product is {chips}, 0 for one to be chosen."
        )
    refused = [_why_not(model, mesh, batch_size) for mesh in meshes]
    possible = [mesh for mesh, why in zip(meshes, refused, strict=True) if not why]
    if not possible:
        raise UserError(
            f"No mesh {said} of {chips} devices can be used: {refused[0]}. Change data.batch_size, or the sizes of the "
            "mesh."
        )
    return possible


def _meshes(chips: int) -> list[dict[str, int]]:
    """All meshes of so many devices, those with the largest `data` first, then those with the largest `fsdp`."""
    divisors = [size for size in range(chips, 0, -1) if chips % size == 0]
    return [
        {"data": data, "fsdp": fsdp, "tensor": chips // data // fsdp}
        for data in divisors
        for fsdp in divisors
        if chips % (data * fsdp) == 0
    ]


def _as_asked(mesh: Mapping[str, int], asked: Mapping[str, int]) -> bool:
    return all(not size or mesh[name] == size for name, size in asked.items())


def _why_not(model: ModelConfig, mesh: Mapping[str, int], batch_size: int) -> str:
    """Why a mesh cannot be used, or nothing."""
    llama, (fsdp, tensor) = model.llama, (mesh["fsdp"], mesh["tensor"])
    if batch_size % (mesh["data"] * fsdp):
        return f"{_named(mesh)} splits the batch {mesh['data'] * fsdp} times and data.batch_size is {batch_size}"
    if llama.num_kv_heads % tensor:
        return f"tensor={tensor} does not divide the {llama.num_kv_heads} kv heads"
    widths = [llama.width, llama.mlp_width, llama.num_kv_heads * llama.head_dim]
    widths += [model.vit.width, model.vit.mlp_width]
    if model.qformer is not None:
        widths += [model.qformer.width, model.qformer.mlp_width]
    uneven = [width for width in widths if width % fsdp or width % tensor]
    if llama.width % (fsdp * tensor):  # both ends of the language model are split by both
        uneven.append(llama.width)
    if uneven:
        return (
            f"{_named(mesh)} does not divide the widths {', '.join(map(str, sorted(set(uneven))))}"
        )
    return ""


def _named(mesh: Mapping[str, int]) -> str:
    return " ".join(f"{name}={mesh[name]}" for name in ("data", "fsdp", "tensor"))
