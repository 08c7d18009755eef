"""benchmarks/smol.py: what a ratio means, when it refuses to measure, and that it needs torch for one side only."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "smol.py"
spec = importlib.util.spec_from_file_location("smol_benchmark", SCRIPT)
assert spec is not None
assert spec.loader is not None
smol = importlib.util.module_from_spec(spec)
sys.modules["smol_benchmark"] = smol  # its dataclasses look their module up
spec.loader.exec_module(smol)


def test_a_ratio_above_one_is_a_row_where_we_are_faster_than_the_faster_variant() -> None:
    found = smol.summary(
        {"ours": [10.0, 11.0, 40.0], "dynamic": [33.0, 22.0, 21.0], "static": [50.0, 60.0, 1.0]}
    )
    assert found["torch_variant"] == "dynamic"
    assert found["ms"] == {"ours": 11.0, "dynamic": 22.0, "static": 50.0}
    assert found["ratio"] == 2.0
    assert found["ratio_of_rounds"] == [0.525, 3.3]
    assert found["ms_of_rounds"]["ours"] == [10.0, 40.0]


def test_numbers_that_disagree_end_the_program_before_anything_is_timed() -> None:
    expected = np.array([1.0, -200.0])
    assert smol.require_agreement("row", np.array([1.0, -199.9]), expected) == pytest.approx(5e-4)
    for wrong in ([1.0, -199.7], [1.3, -200.0], [np.nan, -200.0]):
        with pytest.raises(SystemExit, match="row: the sides differ by"):
            smol.require_agreement("row", np.array(wrong), expected)


def test_without_torch_it_says_what_to_install() -> None:
    # The test's own import of the script shows the rest: nothing of torch is needed to load it.
    script = (
        "import runpy, sys\n"
        "sys.modules.update(torch=None, transformers=None)\n"
        f"sys.argv = ['smol.py', '--rounds', '1']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert 'pip install -e ".[parity]"' in done.stderr
    assert "Traceback" not in done.stderr
