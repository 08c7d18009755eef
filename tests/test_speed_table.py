"""README.md and docs/performance.md show the numbers of benchmarks/results, and the commands that measured them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark_scripts import load_script

tables = load_script("page_tables")
ROOT = Path(__file__).parents[1]
RATIOS = sorted({file for file, make in tables.TABLES.values() if make is tables.ratios})


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_table_shows_what_the_files_hold(page: Path) -> None:
    text = page.read_text()
    assert text == tables.filled(text), "run python benchmarks/page_tables.py"


def test_every_table_is_shown_somewhere() -> None:
    shown = set()
    for page in tables.PAGES:
        shown |= set(re.findall(r"<!-- table: (\w+) -->", page.read_text()))
    assert shown == set(tables.TABLES)


@pytest.mark.parametrize("name", RATIOS)
def test_the_faster_variant_is_the_one_that_counts(name: str) -> None:
    path = tables.RESULTS / f"{name}.json"
    for row in json.loads(path.read_text())["rows"].values() if path.exists() else ():
        theirs = {variant: ms for variant, ms in row["ms"].items() if variant != "ours"}
        assert row["best_variant"] == min(theirs, key=lambda variant: theirs[variant])


def test_the_commands_of_the_pages_are_those_that_write_the_files() -> None:
    said = "".join(page.read_text() for page in tables.PAGES)
    for file, command in tables.COMMANDS.items():
        assert command.endswith(f"benchmarks/results/{file}.json")
        assert (ROOT / command.split()[1]).exists()
    assert tables.COMMANDS["inference_cpu"] in said
    assert tables.COMMANDS["train_cpu"] in said


def row(ratio: float) -> dict[str, Any]:
    return {
        "what": "step: ms",
        "ratio": ratio,
        "ratio_of_rounds": [1.0, 3.0],
        "best_variant": "static",
        "ms": {"ours": 1.5, "dynamic": 4.0, "static": 3.0},
        "rounds": 7,
        "load_after": 1.25,
    }


HARDWARE = {
    "cpu": "EPYC",
    "cores": 2,
    "load_before": 0.5,
    "python": "3.11",
    "jax": "1",
    "flax": "2",
}


def test_a_table_of_ratios_names_the_variant_and_the_machine() -> None:
    found = tables.ratios({"hardware": HARDWARE | {"threads": 2}, "rows": {"a": row(2.0)}})
    assert found == (
        "Medians of 7 rounds on 2 threads of an EPYC with 2 cores (load 0.5 at the start, up to 1.2 behind a row); "
        "python 3.11, jax 1, flax 2.\n\n"
        "| what | here | there | ratio | over the rounds |\n|---|---|---|---|---|\n"
        "| step: ms | 1.50 | 3.00 (static) | 2.00 | 1.00 to 3.00 |"
    )


def test_a_table_of_a_gpu_shows_shares_and_failures_and_no_settings() -> None:
    rows = {
        "settings_default": {"what": "bare", "steps": {}},
        "decode": {"what": "decode", "tokens_per_s": 262.0, "ms": 3.817, "share_of_roofline": 0.82}
        | {"bytes_per_s": 4.3e12, "flop_per_s": 7.9e14},
        "prefill": {"what": "prefill", "ms": 8.5, "share_of_peak": 0.651},
        "broken": {"what": "broken", "error": "out of memory\nat"},
    }
    found = tables.gpu({"hardware": HARDWARE | {"gpu": "H200"}, "rows": rows}).splitlines()
    assert "4.30 TB/s, matmul 790 TFLOP/s" in found[0]
    assert found[4:] == [
        "| decode | 262.0 tokens/s | 3.82 | 82% of bytes |",
        "| prefill |  | 8.50 | 65% of matmul |",
        "| broken | failed: out of memory | | |",
    ]


def test_what_xla_made_of_a_step_is_shown_per_setting() -> None:
    step = {
        "ms": 3.5,
        "kernels_per_layer": 12.5,
        "converts_fused": 4,
        "converts_alone": 0,
        "cache_copies": ["copy.1"],
        "alias_bytes": 64,
        "cache_bytes": 64,
    }
    found = tables.gpu_settings({"rows": {"settings_default": {"steps": {"int8_b1": step}}}})
    assert found.splitlines()[2:] == [
        "| default | int8_b1 | 3.500 | 12.5 | 4 / 0 | 1 | the cache |"
    ]
