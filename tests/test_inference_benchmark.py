"""benchmarks/inference.py on a GPU host, at tiny size on a CPU: the harness must not rot in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.models.layout import DECODE, DECODE_INT8, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import get_preset
from tests.benchmark_scripts import FOLDER, load_script

gpu_host = load_script("gpu_host")
gpu = load_script("inference_gpu")
parts = load_script("parts")
full_size = load_script("full_size")
OURS = [name for name, spec in gpu.ROWS.items() if spec.measure is not None]


@pytest.fixture(scope="module")
def host() -> Any:
    return gpu_host.Host(gpu_host.TINY)


# One for every function and every kind of weights and cache: the others differ in a number or in a preset, tiny here.
@pytest.mark.parametrize(
    "name",
    [
        "settings_default",
        "decode_7b_bf16_b1",
        "decode_7b_int8kv_b64",
        "prefill_7b_bf16_512",
        "images_16",
        "first_token_7b",
    ],
)
def test_every_kind_of_row_runs_at_tiny_size(
    host: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "REPEATS", 1)
    row = json.loads(json.dumps(gpu.ROWS[name].measure(host)))
    if name.startswith("settings"):
        assert set(row["steps"]) == {"bf16_b1", "bf16_b64", "int8_b1", "int8kv_b64"}
        for step in row["steps"].values():
            assert step["ms"] > 0
            assert step["kernels"] > 0
            assert step["alias_bytes"] >= step["cache_bytes"], "the cache is updated in place"
        return
    assert row["ms"] > 0
    if name.startswith("decode"):
        assert row["tokens_per_s"] > 0
        # The last steps of a full context, every slot at the same place.
        context, steps = gpu_host.TINY.context, gpu_host.TINY.steps
        assert context - steps - 8 < row["filled"] <= context
    if name.startswith(("decode", "prefill")):
        assert next(value for key, value in row.items() if key.startswith("share")) > 0


def test_the_bytes_of_a_step_are_what_it_must_read() -> None:
    llama = get_preset("vicuna-7b").model.llama
    plain = full_size.abstract_params_in(get_preset("vicuna-7b").model, DECODE, jnp.bfloat16)
    small = full_size.abstract_params_in(get_preset("vicuna-7b").model, DECODE_INT8, jnp.bfloat16)
    # 6.476 billion in the layers, 0.131 in the head: the arithmetic of the targets.
    assert full_size.matmul_weights(plain) == pytest.approx(6.476e9, rel=1e-3)
    assert full_size.streamed_bytes(plain) == pytest.approx(2 * 6.607e9, rel=1e-3)
    assert full_size.streamed_bytes(small) == pytest.approx(6.607e9, rel=2e-3)
    config = get_preset("vicuna-7b").model
    assert gpu._cache_bytes(config, "bfloat16") == 512 * 1024
    assert gpu._cache_bytes(config, "int8") == 256 * 1024 * (1 + 4 / llama.head_dim)


@pytest.mark.parametrize("layout", [DECODE, DECODE_INT8], ids=["plain", "int8"])
def test_random_weights_have_the_shapes_of_real_ones_and_are_alive(layout: Any) -> None:
    config = get_preset("tiny").model
    abstract = full_size.abstract_params_in(config, layout, jnp.float32)
    drawn = full_size.random_params({"llama": abstract["llama"]})
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(config)["llama"]
    )
    real = convert_layout({"llama": zeros}, DISK, layout, llama=config.llama)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), drawn) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), real
    )
    layer = drawn["llama"]["layers"]["0"]["mlp"]["down_proj"]
    kernel = np.asarray(layer["kernel"]) * np.asarray(layer.get("kernel_scale", 1.0))
    assert kernel.std() == pytest.approx(config.llama.mlp_width**-0.5, rel=0.1)
    assert float(drawn["llama"]["norm"]["scale"].min()) == 1.0


def test_a_row_that_fails_says_why_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(host: Any) -> dict[str, Any]:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    first, second = OURS[:2]
    monkeypatch.setitem(gpu.ROWS, first, gpu.Spec(part="a", seconds=1, script="", measure=fail))
    monkeypatch.setitem(
        gpu.ROWS, second, gpu.Spec(part="a", seconds=1, script="", measure=lambda host: {"ms": 1.0})
    )
    found = dict(parts.measure_rows(gpu.ROWS, [first, second], None, budget_s=100))
    assert found[first]["error"] == "RuntimeError: RESOURCE_EXHAUSTED"
    assert found[second]["ms"] == 1.0
    monkeypatch.setitem(gpu.ROWS, second, gpu.Spec(part="a", seconds=101, script="", measure=fail))
    assert second not in dict(parts.measure_rows(gpu.ROWS, [second], None, budget_s=100))


def test_rows_come_from_processes_and_stay_when_the_time_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import os, time\n"
        "print('warming up', flush=True)\n"
        "print('ROW a {\"ms\": 1}', flush=True)\n"
        "print('ROW flags ' + '{\"of\": \"' + os.environ['XLA_FLAGS'] + '\"}', flush=True)\n"
        "time.sleep(60)\n"
        "print('ROW late {}')\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "--some"}
    alarms: list[Callable[[], None]] = []

    class Alarm(threading.Timer):
        def start(self) -> None:
            alarms.append(self.function)

    monkeypatch.setattr(parts.threading, "Timer", Alarm)
    rows = parts.child_rows([sys.executable, str(script)], environment, limit_s=60)
    assert [next(rows), next(rows)] == [("a", {"ms": 1}), ("flags", {"of": "--some"})]
    alarms[0]()
    assert list(rows) == []


def test_rows_are_picked_in_the_order_of_their_value() -> None:
    names = ["decode_1", "decode_8", "encode_1"]
    assert parts.pick(names, None) == names
    assert parts.pick(names, ["encode", "decode_8"]) == ["decode_8", "encode_1"]
    with pytest.raises(SystemExit, match="There are no rows prefill"):
        parts.pick(names, ["prefill"])


def test_one_command_measures_a_part_in_a_process_and_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [
        sys.executable, str(FOLDER / "inference.py"), "--device", "gpu", "--sizes", "tiny",
        "--only", "prefill_7b_bf16_128", "--out", str(out), "--budget-s", "200",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent)}
    subprocess.run(command, check=True, env=environment, timeout=200)
    found = json.loads(out.read_text())
    assert list(found["rows"]) == ["prefill_7b_bf16_128"]
    assert {"hardware", "sizes", "code", "rows"} == set(found)
    row = found["rows"]["prefill_7b_bf16_128"]
    assert {"what", "ms", "share_of_peak", "bytes_per_s", "flop_per_s", "took_s"} == set(row)


def test_the_gpu_side_imports_nothing_but_models_and_generation() -> None:
    """A GPU host has jax and flax, and neither the configuration, data nor server libraries."""
    blocked = [
        "omegaconf", "grain", "tensorflow_datasets", "array_record", "fastapi", "uvicorn", "tokenizers", "PIL",
        "torch", "transformers", "safetensors", "convert", "minigpt4_jax.api", "minigpt4_jax.loading",
        "minigpt4_jax.data", "minigpt4_jax.conversation", "minigpt4_jax.training", "minigpt4_jax.checkpoint",
    ]  # fmt: skip
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]\n"
        "import inference, inference_gpu, decode_layout\n"
        "print([n for n, found in sys.modules.items() if found and n.startswith('minigpt4_jax.')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rooms = {name.split(".")[1] for name in eval(done.stdout)}
    assert rooms <= {
        "config", "dims", "presets", "sharding", "models", "generation", "gpu_memory", "hardware",
    }  # fmt: skip
