"""Where a process finds its run: what is set, TPU hosts, SLURM, Kubernetes, or nothing; and halves of it refused.

Meeting in real processes: `test_processes.py`.
"""

from __future__ import annotations

import sys

import jax
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.train_config import DistributedConfig
from minigpt4_jax.training import distributed
from minigpt4_jax.training.distributed import Found, find_cluster

NOTHING_SET = DistributedConfig()
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
TPU = {"TPU_ML_PLATFORM": "JAX"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "first", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1",
}  # fmt: skip


@pytest.fixture
def on_a_tpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.jax, "config", type("Config", (), {"jax_platforms": "tpu,cpu"}))


def found(environment: dict[str, str], config: DistributedConfig = NOTHING_SET) -> Found:
    cluster = find_cluster(config, environment)
    assert isinstance(cluster, Found), cluster
    return cluster


def test_what_is_set_comes_first() -> None:
    config = DistributedConfig(coordinator="host:1", num_processes=3, process_id=2)
    cluster = found(SLURM, config)
    assert (cluster.who, cluster.where) == ("process 2 of 3", "host:1")
    assert cluster.arguments == {
        "coordinator_address": "host:1",
        "num_processes": 3,
        "process_id": 2,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, "no TPU host, no task of srun"),
        ({"SLURM_NTASKS": "8"}, "not started by srun"),
        (SLURM | {"SLURM_NTASKS": "1"}, "SLURM job 7 has one task"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "no indexed job"),  # a notebook in a pod
        (TPU, "no TPU host"),  # JAX was told to use the CPU
    ],
)
def test_a_process_without_a_cluster_is_alone_and_says_why(
    environment: dict[str, str], why: str
) -> None:
    said = find_cluster(NOTHING_SET, environment)
    assert isinstance(said, str)
    assert why in said


def test_one_process_can_be_asked_for_inside_a_cluster() -> None:
    alone = DistributedConfig(coordinator="localhost:0", num_processes=1, process_id=0)
    assert find_cluster(alone, SLURM) == "distributed.num_processes is 1"


def test_one_task_a_node_takes_all_of_its_gpus() -> None:
    cluster = found(SLURM | {"SLURM_GPUS_ON_NODE": "8"})
    assert cluster.who == "process 1 of 2"
    assert cluster.arguments == {"local_device_ids": list(range(8))}
    assert found(SLURM).arguments == {}


def test_a_task_for_each_gpu_is_left_to_jax_and_idle_gpus_are_refused() -> None:
    tasks = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NTASKS": "8"}
    assert found(tasks | {"SLURM_GPUS_ON_NODE": "4"}).arguments == {}
    with pytest.raises(UserError, match=r"4 tasks on a node with 8 GPUs.*--ntasks-per-node=1"):
        find_cluster(NOTHING_SET, tasks | {"SLURM_GPUS_ON_NODE": "8"})


@pytest.mark.usefixtures("on_a_tpu_host")
def test_a_tpu_host_waits_for_the_workers_it_knows_of() -> None:
    gke = TPU | {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}
    assert found(gke).who == "worker 2 of 3 of its TPU slice"
    assert found(gke).where == "a"
    assert found(gke | SLICES).where == "first"
    assert found(TPU).where == "the first worker of the pod slice"
    assert isinstance(find_cluster(NOTHING_SET, TPU | {"TPU_SKIP_MDS_QUERY": "1"}), str)


@pytest.mark.usefixtures("on_a_tpu_host")
@pytest.mark.parametrize("missing", SLICES)
def test_half_of_what_several_slices_need_is_refused(missing: str) -> None:
    left = {name: value for name, value in SLICES.items() if name != missing}
    with pytest.raises(UserError, match=rf"no {missing}; expected all three.*Unset"):
        find_cluster(NOTHING_SET, TPU | left)


def test_an_indexed_job_needs_the_package_that_asks_kubernetes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match=r"pod 3 .*distributed\.coordinator.*jax\[k8s\]"):
        find_cluster(NOTHING_SET, pod)
    monkeypatch.setitem(sys.modules, "kubernetes", jax)
    assert found(pod).who == "pod 3 of the job"
