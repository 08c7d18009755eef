"""Does a training run fit on devices that nobody has rented yet, how long will it take, and what to change if not.

For: `minigpt4 plan` and the table of docs/plan.md: a configuration and a slice in, a `Plan` out. Not for: the formulas
(`estimate.py`), what it looks like (`cli_plan.py`), and the compiler's word on it (`plan_compile.py`). Nothing is
allocated and no device is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.estimate import (
    USABLE,
    MemoryEstimate,
    MeshChoice,
    StepFlops,
    StepTime,
    pick_mesh,
    step_flops,
    step_time,
    train_memory,
)
from minigpt4_jax.exchange import Exchange, step_exchange
from minigpt4_jax.hardware import Slice
from minigpt4_jax.presets import PRESETS, get_preset
from minigpt4_jax.train_config import PROMPT_TOKENS, TrainConfig

UTILISATION = 0.5
"""Of the peak rate, for the hours that a run may really take: what the better published runs of such models reach."""
STAGE_1 = (
    "data.batch_size=256",
    "data.prompts=[]",
    "data.max_text_len=32",
    "init_projection=random",
    "optimizer.max_steps=20000",
    "optimizer.warmup_steps=5000",
)
"""What is planned where no configuration is named: the published first stage."""


COUNT_BATCHES = ("max_steps", "warmup_steps", "iters_per_epoch")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run computes, as far as memory and time go."""

    name: str
    model: ModelConfig
    batch_size: int
    accumulate: int
    """Batches per update."""
    schedule: Mapping[str, int]
    """The settings of `OptimizerConfig` that count batches: `max_steps`, `warmup_steps`, `iters_per_epoch`."""
    length: int
    targets: int
    remat: str
    dtype_bytes: int
    vision: bool
    """The image tower runs in the loop."""
    mesh: Mapping[str, int]
    """As configured; 0 for a size to be chosen."""
    notes: tuple[str, ...] = ()
    """What had to be guessed."""

    @property
    def steps(self) -> int:
        """Batches of the whole run."""
        return self.schedule["max_steps"]

    @property
    def shape(self) -> dict[str, Any]:
        """What the functions of `estimate.py` ask for beside model and mesh."""
        return {
            "batch_size": self.batch_size,
            "length": self.length,
            "targets": self.targets,
            "dtype_bytes": self.dtype_bytes,
            "vision": self.vision,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run on a slice before it is rented. Bytes are of one device."""

    work: Work
    target: Slice
    mesh: MeshChoice
    memory: MemoryEstimate
    flops: StepFlops
    exchange: Exchange
    time: StepTime

    @property
    def limit_bytes(self) -> int:
        """What a step may be planned to fill."""
        return int(USABLE * self.target.device.memory_bytes)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit_bytes

    @property
    def hours_floor(self) -> float:
        """Of the whole run at the floor of each step: nothing can be faster."""
        return self.work.steps * self.time.floor / 3600

    def hours_at(self, utilisation: float) -> float:
        """Of the whole run where the model's FLOPs run at this share of the peak, and no other limit is longer.

        Pictures that the devices of `tensor` encode alike count as often.
        """
        flops = self.flops.model + (self.mesh.tensor - 1) * self.flops.vision
        compute = flops / self.target.chips / self.target.device.flops_per_s
        step = max(compute / utilisation, self.time.floor)
        return self.work.steps * step / 3600


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something to do about a run that does not fit, and what comes of it."""

    what: str
    """In the words of the command: settings, or another slice."""
    plan: Plan


def read_work(
    config: TrainConfig, *, length: int | None = None, targets: int | None = None
) -> Work:
    """What a configuration computes.

    Args:
        length: tokens of a sample; None: the longest that the configuration allows (its last bucket, if it has some).
        targets: positions whose logits are computed; None: `data.max_text_len`.

    Raises:
        UserError: the model is neither a preset nor a folder that is there.
    """
    data = config.data
    name, model, notes = _find_model(config.model)
    if length is None:
        length = data.longest_sample(num_image_tokens=model.num_image_tokens)
        if not data.length_buckets and (data.prompts or data.prompt_path):
            notes.append(
                f"a sample has {length} tokens, {PROMPT_TOKENS} of them its prompt's; --length says better"
            )
    return Work(
        name=name,
        model=model,
        batch_size=data.batch_size,
        accumulate=config.optimizer.accum_grad_iters,
        schedule={name: getattr(config.optimizer, name) for name in COUNT_BATCHES},
        length=length,
        targets=targets or data.max_text_len,
        remat=config.remat,
        dtype_bytes=4 if config.dtype == "float32" else 2,
        vision=not config.cache_features,
        mesh=asdict(config.mesh),
        notes=tuple(notes),
    )


def _find_model(name: str) -> tuple[str, ModelConfig, list[str]]:
    """Its name, its sizes, and what was assumed: published configurations name a folder that is yet to be made."""
    if name in PRESETS:
        return name, get_preset(name).model, []
    from minigpt4_jax.model_folder import find_preset  # reads folders, so it needs JAX

    try:
        return name, find_preset(name).model, []
    except UserError:
        last = PurePath(name).name
        if last not in PRESETS:
            raise
        note = f"there is no folder {name!r}; the sizes are those of the preset {last}"
        return last, get_preset(last).model, [note]


def make_plan(work: Work, target: Slice) -> Plan:
    """The estimate of `work` on `target`, on the mesh that is configured or that training would choose.

    Raises:
        UserError: a mesh that cannot be had: see `estimate.pick_mesh`.
    """
    chosen = pick_mesh(
        work.model,
        target=target,
        chips=target.chips,
        asked=work.mesh,
        remat=work.remat,
        **work.shape,
    )
    given = {"mesh": chosen.sizes, **work.shape}
    flops = {name: value for name, value in work.shape.items() if name != "dtype_bytes"}
    moved = {name: value for name, value in given.items() if name != "vision"}
    return Plan(
        work=work,
        target=target,
        mesh=chosen,
        memory=train_memory(work.model, remat=work.remat, **given),
        flops=step_flops(work.model, remat=work.remat, tensor=chosen.tensor, **flops),
        exchange=step_exchange(work.model, **moved),
        time=step_time(work.model, target=target, remat=work.remat, **given),
    )


def what_to_change(plan: Plan) -> list[Change]:
    """Changes in the order of what they cost, each alone and then together, up to the first with which the run fits.

    Empty where it fits already. Where the last one does not fit either, nothing was found.
    """
    tried: list[Change] = []
    if plan.fits:
        return tried
    for what, work, target in _changes(plan):
        try:
            change = Change(what=what, plan=make_plan(work, target))
        except UserError:  # a mesh that this batch or these widths cannot have
            continue
        tried.append(change)
        if change.plan.fits:
            break
    return tried


def _changes(plan: Plan) -> Iterator[tuple[str, Work, Slice]]:
    work, target = plan.work, plan.target
    auto = dict.fromkeys(work.mesh, 0)
    if work.mesh != auto:
        work = replace(work, mesh=auto)
        yield "mesh.data=0 mesh.fsdp=0 mesh.tensor=0", work, target
        prefix = "mesh.data=0 mesh.fsdp=0 mesh.tensor=0 "
    else:
        prefix = ""
    for remat in ("names", "full"):
        if (work.remat, remat) in (("none", "names"), ("none", "full"), ("names", "full")):
            yield f"{prefix}remat={remat}", replace(work, remat=remat), target
    if work.vision:
        said = f"{prefix}cache_features=true data.random_resized_crop=false"
        yield said, replace(work, vision=False), target
    for least in dict.fromkeys((work.remat, "full")):
        for parts in (2, 4, 8, 16, 32):
            if work.batch_size % parts:
                break
            smaller = replace(
                work,
                remat=least,
                batch_size=work.batch_size // parts,
                accumulate=work.accumulate * parts,
                schedule={name: count * parts for name, count in work.schedule.items()},
            )
            counts = [
                f"optimizer.{name}={count}" for name, count in smaller.schedule.items() if count
            ]
            said = (
                f"{prefix}{f'remat={least} ' if least != work.remat else ''}data.batch_size={smaller.batch_size} "
                f"optimizer.accum_grad_iters={smaller.accumulate} {' '.join(counts)}"
            )
            yield said, smaller, target
    for larger in _larger(target):
        option = "--tpu" if target.device.is_tpu else "--gpu"
        yield f"{prefix}{option} {larger.name}", work, larger


def _larger(target: Slice) -> Iterator[Slice]:
    """Slices of more chips, up to sixteen times as many."""
    if not target.device.is_tpu:
        for times in (2, 4, 8, 16):
            yield replace(target, topology=(target.chips * times,))
        return
    for topology in target.device.topologies:
        found = replace(target, topology=topology)
        if target.chips < found.chips <= 16 * target.chips:
            yield found


def to_json(plan: Plan, *, utilisation: float = UTILISATION) -> dict[str, Any]:
    """Plain values under names that stay: bytes of one device, FLOPs of all of them, seconds and hours."""
    work = plan.work
    return {
        "target": plan.target.name,
        "chips": plan.target.chips,
        "hosts": plan.target.hosts,
        "model": work.name,
        "run": {
            "batch_size": work.batch_size,
            "accum_grad_iters": work.accumulate,
            "steps": work.steps,
            "length": work.length,
            "targets": work.targets,
            "remat": work.remat,
            "dtype_bytes": work.dtype_bytes,
            "cached_features": not work.vision,
        },
        "notes": list(work.notes),
        "mesh": {**plan.mesh.sizes, "reason": plan.mesh.reason},
        "fits": plan.fits,
        "bytes_per_device": {
            **asdict(plan.memory),
            "total": plan.memory.total,
            "limit": plan.limit_bytes,
            "device": plan.target.device.hbm_bytes,
        },
        "flops_per_step": {
            **asdict(plan.flops),
            "model": plan.flops.model,
            "hardware": plan.flops.hardware,
        },
        "exchange_bytes_per_device": {**asdict(plan.exchange), "total": plan.exchange.total},
        "seconds_per_step": {**asdict(plan.time), "floor": plan.time.floor},
        "hours": {
            "floor": plan.hours_floor,
            "at_utilisation": plan.hours_at(utilisation),
            "utilisation": utilisation,
        },
        "changes": [
            {
                "what": change.what,
                "fits": change.plan.fits,
                "bytes_per_device": change.plan.memory.total,
                "hours_floor": change.plan.hours_floor,
            }
            for change in what_to_change(plan)
        ],
    }
