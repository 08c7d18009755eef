"""The processes of one run, one a host: how they are found, and how they meet.

For: `start_processes` before anything touches a device. Not for: what they do together afterwards (`together.py`),
meshes (`sharding.py`), which samples a process reads (`data/pipeline.py`).

Differs from the original, whose `init_distributed_mode` reads torchrun's environment and waits without a word.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from minigpt4_jax.config import UserError
from minigpt4_jax.exits import PeerLost
from minigpt4_jax.train_config import DistributedConfig

FIRST_WORD_S, MOST_WORDS_S = 3.0, 30.0
"""A process that waits says so after 3 s, and then at growing distances of up to 30 s."""
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What `srun` gives each of its tasks; JAX asks for the same five (jax/_src/clusters/slurm_cluster.py)."""
MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
"""Of several TPU slices. Left behind by a preempted job in part, they make JAX wait for machines that are gone."""


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
        PeerLost: the others did not come within `config.timeout_s`; after the death of a host they may come later.
        UserError: the environment names a cluster by halves.
    """
    found = find_cluster(config, os.environ)
    if isinstance(found, str):
        print(f"One process: {found}.", flush=True)
        return
    # Its handler of SIGTERM would take the place of ours, and be deaf before the first step (see stopping.py).
    jax.config.update("jax_enable_preemption_service", False)
    _meet(found, timeout_s=config.timeout_s, heartbeat_s=config.heartbeat_s)
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
    platforms = str(getattr(jax.config, "jax_platforms") or "")  # noqa: B009  (jax's types do not name its settings)
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


def _meet(found: Found, *, timeout_s: int, heartbeat_s: int) -> None:
    """Calls `jax.distributed.initialize`, says now and then that it waits, and raises `PeerLost` when it is too long.

    In a thread, and with a longer time for JAX: when its own is over, it aborts the process from C++.
    """
    outcome: list[Exception | None] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                initialization_timeout=2 * timeout_s,
                heartbeat_timeout_seconds=heartbeat_s,
                **found.arguments,
            )
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
    raise PeerLost(
        f"This is {found.who}, found by {found.why}. It waited {time.monotonic() - started:.0f} s for the others at "
        f"{found.where}; expected all of them within distributed.timeout_s={timeout_s}. Start the same command on "
        f"every host, see that all can reach {found.where}, or raise distributed.timeout_s. To run alone on this host, "
        "set distributed.coordinator=localhost:0 distributed.num_processes=1 distributed.process_id=0. What happened: "
        f"{first_lines(error)}"
    ) from error


def first_lines(error: BaseException) -> str:
    """What an error of JAX says, without the pages that can follow."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."
