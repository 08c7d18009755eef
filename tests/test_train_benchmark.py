"""benchmarks/train.py on a GPU host, at tiny size on a CPU: the harness must not rot in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import estimate
from minigpt4_jax.models.layout import TRAIN
from minigpt4_jax.presets import get_preset
from tests.benchmark_scripts import FOLDER, load_script

gpu = load_script("train_gpu")
full_size = load_script("full_size")


@pytest.mark.parametrize("name", ["stage1_7b_cached_64", "stage2_13b_pictures_12"])
def test_every_kind_of_row_runs_at_tiny_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "REPEATS", 1)
    row = json.loads(json.dumps(gpu.ROWS[name].measure(gpu.TINY)))
    _, _, source, batch = name.split("_")
    assert row["samples_per_s"] == pytest.approx(
        1000 * gpu.TINY.batches[batch] / row["ms"], rel=1e-2
    )
    length, targets = gpu.TINY.stages[name.split("_")[0]]
    expected = estimate.step_flops(
        get_preset("tiny-qformer").model, batch_size=gpu.TINY.batches[batch], length=length,
        targets=targets, vision=source == "pictures", remat=gpu.REMAT,
    )  # fmt: skip
    assert row["flop"] == expected.model
    assert row["share_of_peak"] == pytest.approx(
        row["flop"] / row["flop_per_s"] / (row["ms"] / 1000), rel=1e-2
    )
    assert row["utilisation"] is None, "a CPU has no data sheet"


def test_the_step_trains_the_projection_and_pictures_reach_it() -> None:
    trainer = gpu.Trainer(gpu.TINY, model="7b", stage="stage1", batch="64")
    before = np.asarray(trainer.state.projection["kernel"])
    cached = trainer.run(1, pictures=False)
    assert not np.array_equal(before, trainer.state.projection["kernel"])
    assert trainer.run(1, pictures=True) != cached


def test_random_weights_for_training_are_as_lively_as_those_of_one_layer() -> None:
    config = get_preset("tiny-qformer").model
    abstract = full_size.abstract_params_in(config, TRAIN, jnp.float32)
    drawn = full_size.random_params({"llama": abstract["llama"]})
    kernel = drawn["llama"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.shape == (config.llama.num_layers, config.llama.mlp_width, config.llama.width)
    assert float(jnp.std(kernel)) == pytest.approx(config.llama.mlp_width**-0.5, rel=0.1)


def test_one_command_measures_a_row_in_a_process_and_writes_it(tmp_path: Path) -> None:
    out, name = tmp_path / "gpu.json", "stage1_7b_cached_64"
    command = [
        sys.executable, str(FOLDER / "train.py"), "--device", "gpu", "--sizes", "tiny",
        "--only", name, "--out", str(out), "--budget-s", "200",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent)}
    subprocess.run(command, check=True, env=environment, timeout=200)
    found = json.loads(out.read_text())
    assert {"hardware", "sizes", "code", "rows"} == set(found)
    assert list(found["rows"]) == [name]
    assert "error" not in found["rows"][name]


def test_a_table_of_training_shows_speed_shares_and_failures() -> None:
    tables = load_script("page_tables")
    row = {"what": "stage1", "samples_per_s": 212.04, "ms": 1207.3, "peak_bytes": 104.2e9}
    rows = {
        "ours": row | {"share_of_peak": 0.61, "utilisation": None},
        "torch": row,
        "broken": {"what": "broken", "error": "out of memory\nat"},
    }
    hardware = {"cpu": "EPYC", "gpu": "H200", "cores": 2, "load_before": 0.5, "python": "3.11"}
    assert tables.gpu_training({"hardware": hardware, "rows": rows}).splitlines()[4:] == [
        "| stage1 | 212.0 | 1,207.3 | 61% |  | 104.2 |",
        "| stage1 | 212.0 | 1,207.3 |  |  | 104.2 |",
        "| broken | failed: out of memory | | | | |",
    ]


def test_the_gpu_side_imports_nothing_that_reads_data() -> None:
    """A GPU host has jax, flax and optax, and neither the configuration, data nor checkpoint libraries."""
    blocked = [
        "omegaconf", "grain", "tensorflow_datasets", "array_record", "tokenizers", "PIL", "orbax", "tensorboardX",
        "torch", "transformers", "safetensors", "convert", "minigpt4_jax.api", "minigpt4_jax.loading",
        "minigpt4_jax.data", "minigpt4_jax.generation",
    ]  # fmt: skip
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]\n"
        "import train, train_gpu\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_nothing_touches_a_device_before_the_parts_do() -> None:
    program = (
        "import sys\n"
        f"sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]\n"
        "import train, train_gpu\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
