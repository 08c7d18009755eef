"""The processes of one run, one a host: how they find each other, wait for each other, and end when one is lost.

For: `run_beside_others` around a whole run, before anything touches a device; `first_process_first` around what writes
a shared folder; `Agreement` and `of_all_processes` for what they must know of each other. Not for: meshes
(`sharding.py`), which samples a process reads (`data/pipeline.py`), stopping together (`stopping.py`).

What only process 0 does: the progress and the metrics (`metrics.py`), the checksums of a checkpoint
(`checkpoints.py`; its arrays are written by all), the finished projection (`loop.py`), and "Done" (`cli.py`). What all
do: read the frozen weights and their share of the samples, and say what goes wrong, with their number in front.

Differs from the original, whose `init_distributed_mode` reads torchrun's environment and waits without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from minigpt4_jax.config import UserError
from minigpt4_jax.exits import PROBLEM, PeerLost, Stopped, run_command
from minigpt4_jax.sharding import one_for_each_device
from minigpt4_jax.train_config import DistributedConfig

FIRST_WORD_S, MOST_WORDS_S = 3.0, 30.0
"""A process that waits says so after 3 s, and then at growing distances of up to 30 s."""
TEXT_MULTIPLE = 4096
"""Bytes; texts between processes are padded up to a multiple, so that a run compiles their exchange once."""
DAY_MS = 24 * 3600 * 1000
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What `srun` gives each of its tasks; JAX asks for the same five (jax/_src/clusters/slurm_cluster.py)."""
MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
"""Of several TPU slices. Left behind by a preempted job in part, they make JAX wait for machines that are gone."""
LOST = re.compile(
    "gloo|nccl|connection (reset|refused|closed)|socket closed|broken pipe|heartbeat|coordination|barrier|"
    "unavailable|deadline_exceeded|remote process",
    re.IGNORECASE,
)
"""What errors of JAX say when another process is gone: the collectives' own words, and the coordination service's."""


class Found(NamedTuple):
    """A cluster: where its processes meet, and what `jax.distributed.initialize` needs to be told of it."""

    why: str
    """Where it was found, in words."""
    who: str
    """`process 1 of 4`, or as much of it as is known before the processes have met."""
    where: str
    """Where they meet, as far as it is known."""
    arguments: dict[str, Any]


def is_first_process() -> bool:
    """Whether this process is the one that writes what there is one of."""
    return bool(jax.process_index() == 0)


def start_processes(config: DistributedConfig) -> None:
    """Meets the other processes of the run, if it has any, and prints which they are and how they were found.

    Must come before anything that touches a device.

    Raises:
        UserError: the others did not come within `config.timeout_s`, or the environment names a cluster by halves.
    """
    found = find_cluster(config, os.environ)
    if isinstance(found, str):
        print(f"One process: {found}.", flush=True)
        return
    # Its handler of SIGTERM would take the place of ours, and be deaf before the first step (see stopping.py).
    jax.config.update("jax_enable_preemption_service", False)
    _meet(found, timeout_s=config.timeout_s)
    print(
        f"Process {jax.process_index()} of {jax.process_count()}, with {jax.local_device_count()} of "
        f"{jax.device_count()} devices; found by {found.why}.",
        flush=True,
    )


def find_cluster(config: DistributedConfig, environment: Mapping[str, str]) -> Found | str:
    """The cluster that this process belongs to; or, in words, why it is alone."""
    if config.num_processes == 1:
        return "distributed.num_processes is 1"
    if config.coordinator:
        return Found(
            "distributed.coordinator",
            f"process {config.process_id} of {config.num_processes}",
            config.coordinator,
            {
                "coordinator_address": config.coordinator,
                "num_processes": config.num_processes,
                "process_id": config.process_id,
                "cluster_detection_method": "deactivate",
            },
        )
    if all(name in environment for name in SLURM):
        return _slurm(environment)
    # `import jax` sets it on a TPU host where libtpu is installed (jax/_src/cloud_tpu_init.py).
    platforms = jax.config.jax_platforms
    if environment.get("TPU_ML_PLATFORM") == "JAX" and (not platforms or "tpu" in platforms):
        return _tpu(environment)
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return _kubernetes(environment)
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1":
        return f"SLURM_NTASKS is {tasks}, but it was not started by srun"
    return "distributed.* is not set, and this is no TPU host, no task of srun and no indexed job of Kubernetes"


def _slurm(environment: Mapping[str, str]) -> Found | str:
    job, nodes, tasks, number, _ = (environment[name] for name in SLURM)
    if tasks == "1":
        return f"SLURM job {job} has one task"
    arguments: dict[str, Any] = {}
    on_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if on_node == "1" and gpus.isdigit():
        # Else JAX gives the task one GPU, the one with its number on the node, and leaves the others idle.
        arguments["local_device_ids"] = list(range(int(gpus)))
    elif on_node.isdigit() and gpus.isdigit() and int(gpus) > int(on_node):
        raise UserError(
            f"SLURM started {on_node} tasks on a node with {gpus} GPUs; expected one task a node, which takes all of "
            f"them, or {gpus}. JAX would leave the others idle. Set --ntasks-per-node=1."
        )
    where = f"the first host of {nodes}"
    return Found(f"SLURM job {job}", f"process {number} of {tasks}", where, arguments)


def _tpu(environment: Mapping[str, str]) -> Found | str:
    slices = {name: environment[name] for name in MEGASCALE if environment.get(name)}
    if slices and len(slices) < len(MEGASCALE):
        missing = ", ".join(name for name in MEGASCALE if name not in slices)
        raise UserError(
            f"The environment has {', '.join(f'{k}={v}' for k, v in slices.items())} and no {missing}; expected all "
            "three (several TPU slices) or none. Unset what an earlier job left behind."
        )
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if names is None and environment.get("TPU_SKIP_MDS_QUERY"):
        return "TPU_SKIP_MDS_QUERY is set and TPU_WORKER_HOSTNAMES is not: a TPU host by itself"
    why = "a TPU host"
    if slices:
        why += f" in slice {slices['MEGASCALE_SLICE_ID']} of {slices['MEGASCALE_NUM_SLICES']}"
    if names is None:
        where = slices.get(MEGASCALE[0], "the first worker of the pod slice")
        return Found(f"the metadata of {why}", "one worker of a TPU pod slice", where, {})
    hosts = names.split(",")
    who = f"worker {environment.get('TPU_WORKER_ID')} of {len(hosts)} of its TPU slice"
    return Found(f"TPU_WORKER_HOSTNAMES of {why}", who, slices.get(MEGASCALE[0], hosts[0]), {})


def _kubernetes(environment: Mapping[str, str]) -> Found:
    number = environment["JOB_COMPLETION_INDEX"]
    try:
        import kubernetes  # noqa: F401  (JAX asks the cluster through it)
    except ImportError as error:
        raise UserError(
            f"This is pod {number} of an indexed job of Kubernetes, and the package kubernetes, by which JAX finds the "
            "other pods, is not installed. Give distributed.coordinator, distributed.num_processes and "
            "distributed.process_id (deploy/gke/train-jobset-gpu.yaml shows how), or pip install 'jax[k8s]'."
        ) from error
    return Found(
        "JOB_COMPLETION_INDEX of a Kubernetes job",
        f"pod {number} of the job",
        "pod 0 of the job",
        {},
    )


def _meet(found: Found, *, timeout_s: int) -> None:
    """Calls `jax.distributed.initialize`, says now and then that it waits, and raises `UserError` when it is too long.

    In a thread, and with a longer time for JAX: when its own is over, it aborts the process from C++.
    """
    outcome: list[Exception | None] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(initialization_timeout=2 * timeout_s, **found.arguments)
        except Exception as error:  # raised again below, in the thread that waits for this one
            outcome.append(error)
        else:
            outcome.append(None)

    connecting = threading.Thread(target=initialize, daemon=True)
    connecting.start()
    started, pause = time.monotonic(), FIRST_WORD_S
    while (left := started + timeout_s - time.monotonic()) > 0:
        connecting.join(min(pause, left))
        if not connecting.is_alive():
            break
        waited = time.monotonic() - started
        print(
            f"{found.who[0].upper()}{found.who[1:]} waits for the others at {found.where} "
            f"({waited:.0f} s so far, gives up after {timeout_s} s).",
            file=sys.stderr,
            flush=True,
        )
        pause = min(2 * pause, MOST_WORDS_S)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {timeout_s} s")
    if error is None:
        return
    if not isinstance(error, RuntimeError | OSError):  # a mistake of this project
        raise error
    raise UserError(
        f"This is {found.who}, found by {found.why}. It waited {time.monotonic() - started:.0f} s for the others at "
        f"{found.where}; expected all of them within distributed.timeout_s={timeout_s}. Start the same command on "
        f"every host, see that all can reach {found.where}, or raise distributed.timeout_s. To run alone on this host, "
        "set distributed.coordinator=localhost:0 distributed.num_processes=1 distributed.process_id=0. What happened: "
        f"{_first_lines(error)}"
    ) from error


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """The block in process 0, and when that is through it in all others: for files that one makes and all read.

    `name` may be used once in a run. Nothing but a process's death ends the waiting: the block may take hours.
    """
    wait = None if jax.process_count() == 1 else ocp.multihost.get_barrier_sync_fn()
    if wait is not None and not is_first_process():
        wait(key=name, timeout_ms=DAY_MS)
    yield
    if wait is not None and is_first_process():
        wait(key=name, timeout_ms=DAY_MS)


class Agreement:
    """What processes decide together after every step: the largest number that any of them gave, one call later.

    Each puts its number beside those of the others and takes the maximum on the devices, behind the step that runs
    there; it is read at the next call, when it is long there. So no step waits for it, and all read the same.
    """

    def __init__(self) -> None:
        self._side_by_side, everywhere = one_for_each_device(jax.devices())
        self._max = jax.jit(jnp.max, out_shardings=everywhere)
        self._before: jax.Array | None = None

    def after(self, number: int) -> int:
        """Gives `number`, returns the largest of the call before: 0 at the first call. Waits for no other process."""
        mine = np.full(jax.local_device_count(), number, np.int32)
        together = jax.make_array_from_process_local_data(self._side_by_side, mine)
        before, self._before = self._before, self._max(together)
        return 0 if before is None else int(before)


def of_all_processes(value: Any) -> list[Any]:
    """A JSON-like value of every process, in their order. All processes of a run must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text), np.int32))
    padded = np.zeros(-(-sizes.max() // TEXT_MULTIPLE) * TEXT_MULTIPLE, np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def run_beside_others(command: Callable[[], int], *, config: DistributedConfig) -> int:
    """Meets the others and runs `command`; says with this process's number what went wrong, and returns the exit code.

    Alone it is just `command`. Beside others a process that fails ends here and now: at Python's end JAX waits for all
    processes of the run, and they would wait for this one in the middle of a step.
    """
    try:
        start_processes(config)
    except UserError as error:
        print(f"minigpt4: {error}", file=sys.stderr)
        _leave(PROBLEM)
    if not jax.distributed.is_initialized():
        return command()
    me = f"process {jax.process_index()} of {jax.process_count()}"
    together = True

    def watched() -> int:
        nonlocal together
        try:
            return command()
        except jax.errors.JaxRuntimeError as error:
            together = False
            if not LOST.search(str(error)):
                raise
            raise PeerLost(
                f"Another process of the run died or cannot be reached; expected all {jax.process_count()} to its end. "
                "Its own output says why. Start all of them again: the run goes on at its last checkpoint. JAX says: "
                f"{_first_lines(error)}"
            ) from error
        except BaseException as error:
            together = isinstance(error, Stopped)
            raise

    try:
        code = run_command(
            watched, say=lambda text: print(f"minigpt4 ({me}): {text}", file=sys.stderr)
        )
    except (
        BaseException
    ):  # a mistake of this project: its traceback, but no waiting for the others either
        print(f"minigpt4 ({me}):\n{traceback.format_exc()}", file=sys.stderr)
        _leave(1)
    return code if together else _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_lines(error: BaseException) -> str:
    """What an error of JAX says, without the pages that can follow."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."
