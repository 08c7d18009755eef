"""The table of docs/plan.md: stage 1 of the published 7B and 13B on devices that people rent, before they rent them.

    python benchmarks/plan_table.py --out benchmarks/results/plan.json && python benchmarks/page_tables.py

Estimates for every row, and for the TPU rows what XLA:TPU says (the `plan` extra): train step, prefill and decode step,
each compiled at full size on the CPU in a process of its own. 30 programs take an hour on two busy cores; the file is
written after each, and what was compiled with the same versions and settings is not compiled again. Not for: speed on a
device. The GPU rows are arithmetic alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from minigpt4_jax.config_file import load
from minigpt4_jax.hardware import Slice, parse_gpu, parse_tpu
from minigpt4_jax.plan import STAGE_1, make_plan, read_work, to_json
from minigpt4_jax.plan_compile import PROGRAMS, compile_plan
from minigpt4_jax.train_config import TrainConfig

MODELS = ("vicuna-7b", "vicuna-13b")
TPUS = ("v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v5p:2x2x2", "v6e:2x4")
GPUS = ("a100-80:4", "h200:1")
VERSIONS = ("jax", "jaxlib", "libtpu")


def target_of(name: str) -> Slice:
    """Of a row."""
    return parse_tpu(name) if name in TPUS else parse_gpu(name)


def estimate(model: str, target: str, *, cached: bool) -> dict[str, Any]:
    """One row without the compiler."""
    settings = [*STAGE_1, f"model={model}", f"cache_features={str(cached).lower()}"]
    work = read_work(load(TrainConfig, None, settings))
    return to_json(make_plan(work, target_of(target)))


def estimates() -> dict[str, dict[str, Any]]:
    """All rows: `MODEL TARGET cached` and `MODEL TARGET pictures`."""
    return {
        f"{model} {target} {'cached' if cached else 'pictures'}": estimate(
            model, target, cached=cached
        )
        for model in MODELS
        for target in (*TPUS, *GPUS)
        for cached in (True, False)
    }


def sizes(row: dict[str, Any]) -> list[Any]:
    """Of a row's mesh."""
    return [row.get("mesh", {}).get(axis) for axis in ("data", "fsdp", "tensor")]


def versions() -> dict[str, str]:
    """Of what compiles; empty without libtpu."""
    try:
        return {name: importlib.metadata.version(name) for name in VERSIONS}
    except importlib.metadata.PackageNotFoundError:
        return {}


def compile_one(model: str, target: str, program: str) -> dict[str, Any]:
    """One program of a row, as `minigpt4 plan --compile` does it."""
    config = load(TrainConfig, None, [*STAGE_1, f"model={model}"])
    plan = make_plan(read_work(config), target_of(target))
    (compiled,) = compile_plan(plan, config.optimizer, (program,))
    return compiled.to_json()


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    out = parser.parse_args().out
    before = json.loads(out.read_text())["rows"] if out.exists() else {}
    rows, here = estimates(), versions()
    for key, row in rows.items():  # what was compiled before
        found = before.get(key, {})
        same = found.get("run") == row["run"] and sizes(found) == sizes(row)
        if same and "compiled" in found and (not here or found["versions"] == here):
            row |= {"compiled": found["compiled"], "versions": found["versions"]}
    out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if not here:
        print("libtpu is not installed: estimates alone.", file=sys.stderr)
        return
    spawn = multiprocessing.get_context("spawn")
    for program in PROGRAMS:  # the train steps of all rows first
        for key, row in rows.items():
            found = row.get("compiled", [])
            done = program in [each["name"] for each in found]
            if done or row["target"] not in TPUS or not key.endswith("cached"):
                continue
            print(key, program, flush=True)
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                job = pool.submit(compile_one, row["model"], row["target"], program)
                row |= {"compiled": [*found, job.result()], "versions": here}
            out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
