"""README's table of speeds shows the numbers of benchmarks/results/smol.json, and the command that measured them."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "smol.json").read_text())
SECTION = README.split("## How fast is it\n")[1].split("\n## ")[0]


def test_every_number_of_the_table_is_the_measured_one() -> None:
    shown = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if line[:2] == "| "][1:]
    measured = []
    for row in RESULT["rows"].values():
        times = (row["ms"]["ours"], row["ms"][row["torch_variant"]])
        spread = " to ".join(f"{x:.2f}" for x in row["ratio_of_rounds"])
        measured.append([row["what"], *(f"{x:,.1f}" for x in times), f"{row['ratio']:.2f}", spread])
    assert shown == measured


def test_the_faster_side_of_torch_is_the_one_that_counts() -> None:
    for row in RESULT["rows"].values():
        theirs = {name: ms for name, ms in row["ms"].items() if name != "ours"}
        assert row["torch_variant"] == min(theirs, key=lambda name: theirs[name])


def test_the_text_says_where_and_how() -> None:
    said, hardware = " ".join(SECTION.split()), RESULT["hardware"]
    most = max(row["load_after"] for row in RESULT["rows"].values())
    for part in (
        f"on {hardware['threads']} threads of an {hardware['cpu']} with {hardware['cores']} cores",
        f"load {hardware['load_before']:.1f} at the start, up to {most:.1f}",
        f"Medians of {RESULT['rounds']} rounds",
        f"Python {hardware['python']}, jax {hardware['jax']}, flax {hardware['flax']}, torch {hardware['torch']}, "
        f"transformers {hardware['transformers']}",
    ):
        assert part in said
    (command,) = re.findall(r"```\n(.*?)\n```", SECTION, re.DOTALL)
    assert command == "python benchmarks/smol.py --out benchmarks/results/smol.json"
