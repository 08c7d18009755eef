"""docs/own_data.md shows the numbers of benchmarks/results/data_readers.json, and the command that measured them."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own_data.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "data_readers.json").read_text())
KINDS = {
    "`tar`": "tars",
    "`array_record`": "array_record",
    "`cc_sbu_align`": "folder",
    "webdataset": "webdataset",
}


def test_every_number_of_the_table_is_the_measured_one() -> None:
    lines = re.findall(r"^\| (\S+) \| (\S+) /s \| (\S+) \| (\S+) /s \| (\S+) \|$", PAGE, re.M)
    assert [KINDS[kind] for kind, *_ in lines] == list(RESULT["pictures_per_s"])
    for kind, *cells in lines:
        rates, ratios = (
            RESULT[key][KINDS[kind]] for key in ("pictures_per_s", "ratio_to_webdataset")
        )
        assert cells == [
            cell for row in ("read", "decode") for cell in (f"{rates[row]:,.0f}", f"{ratios[row]:.2f}")
        ]  # fmt: skip


def test_the_text_says_what_was_measured_where_and_how() -> None:
    said = " ".join(PAGE.split())
    assert (
        f"Medians of {RESULT['rounds']} rounds over {RESULT['pictures']:,} JPEGs of {RESULT['side']} x"
        in said
    )
    assert f"Python {RESULT['python']} on one {RESULT['machine']} core" in said
    assert RESULT["cores_used"] == 1
    assert "python benchmarks/data_readers.py --out benchmarks/results/data_readers.json" in PAGE
