"""What the real compiler says of a plan: XLA:TPU compiles the full-size programs on a host without a TPU.

For: `compile_plan`, through PyPI's libtpu (the `plan` extra; its terms of service are the Google Cloud Platform's).
Train step, prefill and decode step are lowered from shapes alone, for a described slice, and nothing is allocated. Not
for: GPUs, whose compiler wants one to be there; and not for speed: the compiler's memory is what is asked for.

No XLA flags are set. Names of slices as in MaxText's accelerator_to_spec_map.py: v5p is called "v5", and v4 and v5p
show one device a chip only as "megacore".
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minigpt4_jax.config import UserError
from minigpt4_jax.hardware import Slice
from minigpt4_jax.plan import Plan
from minigpt4_jax.train_config import OptimizerConfig

SLOTS, CONTEXT = 8, 1024
"""Answers written at once, and the longest of them with its prompt: what the decode step is compiled for."""
PROMPTS, PROMPT = 4, 128
"""Prompts read together, and their padded length."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One program. Bytes are of one device."""

    name: str
    seconds: float
    """That the compiler took here."""
    argument_bytes: int = 0
    temp_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    """Of the results, what lies in the memory of donated arguments."""
    error: str = ""
    """The compiler's message in short; the bytes mean nothing then."""

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "total_bytes": self.total_bytes}


PROGRAMS = ("train step", "prefill", "decode step")


def compile_plan(
    plan: Plan, optimizer: OptimizerConfig, programs: Sequence[str] = PROGRAMS
) -> list[Compiled]:
    """Compiles the programs of a plan for its slice, one after the other.

    Raises:
        UserError: libtpu is not installed, or refuses the slice.
    """
    devices = describe_devices(plan.target)
    from minigpt4_jax.models.minigpt4 import abstract_params

    abstract_params(
        plan.work.model
    )  # kept; made under the mesh of devices that are not there, it would ask for them
    compilers = {
        "train step": functools.partial(_train_step, plan, optimizer, devices),
        "prefill": functools.partial(_prefill, plan, devices),
        "decode step": functools.partial(_decode_step, plan, devices),
    }
    return [measure(name, compilers[name]) for name in programs]


def describe_devices(target: Slice) -> Sequence[Any]:
    """The devices of a slice that need not exist. Call it before anything else has started JAX's backends."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            '--compile needs libtpu (484 MB), which is not installed; expected the `plan` extra. pip install ".[plan]"'
        )
    # libtpu looks for the machine that it is on: a described slice is on none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # its lock is for chips; none is touched
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    for level in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        os.environ.setdefault(level, "3")
    import jax
    from jax.experimental import topologies

    if "JAX_PLATFORMS" not in os.environ:  # libtpu is here to compile; no device is wanted
        jax.config.update("jax_platforms", "cpu")
    flat = len(target.topology) == 2
    name = {"v5p": "v5"}.get(target.device.name, target.device.name)
    closed = [target.closes(side) for side in target.topology]
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{name}:{'x'.join(map(str, target.topology))}",
            chip_config_name="default" if flat else "megacore",
            chips_per_host_bounds=(1, 1, 1) if target.chips == 1 else (2, 2, 1),
            num_slices=1,
            wrap=(*closed, *[False] * (3 - len(closed))),
        )
    except Exception as error:  # whatever libtpu raises: its message is all that there is
        raise UserError(
            f"libtpu does not describe {target.name}: {str(error).splitlines()[0][:200]}. Expected a slice that this "
            "version knows; try another one, or another version of libtpu."
        ) from error
    devices: Sequence[Any] = described.devices
    return devices


def measure(name: str, compile_it: Callable[[], Any]) -> Compiled:
    """Runs the compiler and reads its memory analysis, or its message where it finds no room."""
    from jax.errors import JaxRuntimeError

    start = time.monotonic()
    try:
        compiled = compile_it()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(name=name, seconds=time.monotonic() - start, error=shorten(str(error)))
    seconds, found = time.monotonic() - start, compiled.memory_analysis()
    return Compiled(
        name=name,
        seconds=seconds,
        argument_bytes=found.argument_size_in_bytes,
        temp_bytes=found.temp_size_in_bytes,
        output_bytes=found.output_size_in_bytes,
        alias_bytes=found.alias_size_in_bytes,
    )


def shorten(message: str) -> str:
    """The sentence of an out-of-memory message that has the numbers, or its first line."""
    found = re.search(r"(Ran out of memory on HBM, .*\(\S+G\)|Used \S+ of \S+ hbm)\.", message)
    said = found.group(1) if found else message.splitlines()[0]
    return " ".join(said.split())[:300]


def _train_step(plan: Plan, optimizer: OptimizerConfig, devices: Sequence[Any]) -> Any:
    """The step that `train.py` runs, on the plan's mesh."""
    import jax.numpy as jnp

    from minigpt4_jax.sharding import make_mesh
    from minigpt4_jax.training.program import lower_train_step

    work = plan.work
    lowered = lower_train_step(
        work.model,
        optimizer,
        mesh=make_mesh(**plan.mesh.sizes, devices=devices),
        batch_size=work.batch_size,
        length=work.length,
        targets=work.targets,
        remat=work.remat,
        dtype=jnp.bfloat16 if work.dtype_bytes == 2 else jnp.float32,
    )
    return lowered.compile()


@dataclass(frozen=True)
class _Serving:
    """What prefill and decode step share: the language model in bfloat16, in slices over `tensor`."""

    mesh: Any
    model: Any
    params: Any
    place: Callable[[str], Any]


def _serving(plan: Plan, devices: Sequence[Any]) -> _Serving:
    """As many devices along `tensor` as divide the kv heads; the others are copies of these."""
    import jax
    import jax.numpy as jnp

    from minigpt4_jax.models.layout import DISK, Layout, convert_layout
    from minigpt4_jax.models.minigpt4 import abstract_params, make_model
    from minigpt4_jax.sharding import cache_sharding, make_mesh, make_shardings, replicated

    config = plan.work.model
    tensor = math.gcd(len(devices), config.llama.num_kv_heads)
    mesh = make_mesh(data=len(devices) // tensor, tensor=tensor, devices=devices)
    layout = Layout(stacked=False, fused=True, int8=False, shards=tensor)
    whole = {"llama": abstract_params(config)["llama"]}
    cut = jax.eval_shape(lambda tree: convert_layout(tree, DISK, layout, llama=config.llama), whole)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place),
        cut,
        make_shardings(mesh, cut),
    )
    caches = cache_sharding(mesh, num_kv_heads=config.llama.num_kv_heads)
    return _Serving(
        mesh=mesh,
        model=make_model(config, layout=layout, dtype=jnp.bfloat16),
        params=params,
        place=lambda path: caches if ".caches" in path else replicated(mesh),
    )


def _compile(serving: _Serving, function: Any, args: Sequence[Any], donate: Sequence[int]) -> Any:
    import jax

    from minigpt4_jax.generation.programs import compile_program

    with jax.set_mesh(serving.mesh):
        return compile_program(function, args, donate=donate, place=serving.place).compiled


def _prefill(plan: Plan, devices: Sequence[Any]) -> Any:
    import jax
    import jax.numpy as jnp

    from minigpt4_jax.generation.decode import prefill

    serving = _serving(plan, devices)
    everywhere = serving.place("")
    shapes = ((PROMPTS, PROMPT), (PROMPTS, PROMPT, plan.work.model.llama.width), (PROMPTS,))
    dtypes = (jnp.int32, jnp.bfloat16, jnp.int32)
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    function = functools.partial(prefill, model=serving.model, cache_dtype=jnp.bfloat16)
    return _compile(serving, function, (serving.params, *args), ())


def _decode_step(plan: Plan, devices: Sequence[Any]) -> Any:
    import jax
    import jax.numpy as jnp

    from minigpt4_jax.generation.decode import decode_step
    from minigpt4_jax.generation.state import init_state

    serving = _serving(plan, devices)
    make = functools.partial(
        init_state, plan.work.model.llama, SLOTS, capacity=CONTEXT + 1, dtype=jnp.bfloat16
    )
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=serving.place(jax.tree_util.keystr(path))
        ),
        jax.eval_shape(make),
    )
    alive = jax.ShapeDtypeStruct((SLOTS,), bool, sharding=serving.place(""))
    function = functools.partial(
        decode_step, model=serving.model, rows=SLOTS, places=CONTEXT, plain=False
    )
    return _compile(serving, function, (serving.params, state, alive), (1,))
