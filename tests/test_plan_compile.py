"""plan_compile.py: all three programs compile from shapes for devices that it is given, and bytes are read as they are.

The slices here are four CPU devices: libtpu is 484 MB and takes minutes. `benchmarks/plan_table.py` is the run with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import pytest
from jax.errors import JaxRuntimeError

from minigpt4_jax import plan_compile
from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import load
from minigpt4_jax.hardware import Slice, parse_tpu
from minigpt4_jax.parameters import count_parameters
from minigpt4_jax.plan import STAGE_1, Plan, make_plan, read_work
from minigpt4_jax.plan_compile import compile_plan, describe_devices, measure, shorten
from minigpt4_jax.train_config import TrainConfig
from tests.signature_checks import without_signature_checks


def tiny_plan(*overrides: str) -> tuple[Plan, TrainConfig]:
    settings = [*STAGE_1, "model=tiny-qformer", "dtype=float32", "data.batch_size=8"]
    config = load(TrainConfig, None, [*settings, *overrides])
    return make_plan(read_work(config), parse_tpu("v5e:2x2")), config


def test_every_program_of_a_plan_compiles_on_its_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def devices(target: Slice) -> Sequence[Any]:
        asked.append(target.name)
        return jax.devices()[:4]

    monkeypatch.setattr(plan_compile, "describe_devices", devices)
    monkeypatch.setattr(plan_compile, "CONTEXT", 128)
    plan, config = tiny_plan("mesh.fsdp=2", "mesh.tensor=2")
    with without_signature_checks():
        compiled = compile_plan(plan, config.optimizer)
    assert asked == ["v5e:2x2"]
    assert [each.name for each in compiled] == ["train step", "prefill", "decode step"]
    assert all(each.seconds > 0 and not each.error for each in compiled)
    train = compiled[0]
    counts = count_parameters(plan.work.model)
    # The arguments on a device: its quarter of the frozen weights, the projection with its moments, and its rows.
    least = 4 * (counts["llama"].on_device(plan.mesh.sizes) + 3 * counts["llama_proj"].total)
    assert least < train.argument_bytes < 1.3 * least
    assert train.alias_bytes >= 4 * 3 * counts["llama_proj"].total  # the state is donated
    assert compiled[2].alias_bytes > 0  # and so are the caches


def test_a_program_that_finds_no_room_is_a_row_with_the_compilers_numbers() -> None:
    message = (  # of libtpu 0.0.52
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (32.92G) exceeds available HBM (31.24G). HLO module: jit_train_step.\nSee https://openxla.org/"
    )

    def compile_it() -> Any:
        raise JaxRuntimeError(message)

    found = measure("train step", compile_it)
    assert (
        found.error
        == message.removeprefix("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: ").partition(
            ". HLO"
        )[0]
    )
    assert "(32.92G) exceeds available HBM (31.24G)" in found.error
    assert found.total_bytes == 0


def test_another_error_of_the_compiler_is_not_taken_for_one_of_memory() -> None:
    def compile_it() -> Any:
        raise JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(JaxRuntimeError, match="a bug"):
        measure("train step", compile_it)


def test_a_message_of_another_form_is_cut_to_its_first_line() -> None:
    assert shorten("RESOURCE_EXHAUSTED: no room\nline 2") == "RESOURCE_EXHAUSTED: no room"
    older = "Ran out of memory in memory space hbm. Used 19.90G of 15.75G hbm. Exceeded hbm capacity by 4.15G."
    assert shorten(older) == "Used 19.90G of 15.75G hbm"


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'pip install "\.\[plan\]"'):
        describe_devices(parse_tpu("v5e:2x2"))


@pytest.mark.parametrize(
    ("text", "name", "chip", "hosts", "wrap"),
    [
        ("v5e:2x4", "v5e:2x4", "default", (2, 2, 1), (False, False, False)),
        ("v6e:1x1", "v6e:1x1", "default", (1, 1, 1), (False, False, False)),
        ("v5e:8x16", "v5e:8x16", "default", (2, 2, 1), (False, True, False)),
        ("v4:2x2x1", "v4:2x2x1", "megacore", (2, 2, 1), (False, False, False)),
        ("v5p:4x4x8", "v5:4x4x8", "megacore", (2, 2, 1), (True, True, True)),
    ],
)
def test_a_slice_is_described_in_libtpus_words(
    text: str,
    name: str,
    chip: str,
    hosts: tuple[int, ...],
    wrap: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jax.experimental import topologies

    given: dict[str, Any] = {}

    def describe(**words: Any) -> Any:
        given.update(words)
        raise RuntimeError("no such topology\nmore")

    for variable in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(variable, "set")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(UserError, match=f"libtpu does not describe {text}: no such topology"):
        describe_devices(parse_tpu(text))
    assert (given["topology_name"], given["chip_config_name"]) == (name, chip)
    assert (given["chips_per_host_bounds"], given["wrap"]) == (hosts, wrap)
