"""benchmarks/measuring.py: what a ratio means, when it refuses to measure, what an interrupted run keeps."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmark_scripts import FOLDER, load_script

measuring = load_script("measuring")
HEAD = {"hardware": {"cpu": "EPYC", "load_before": 0.5}, "rounds": 5}


def test_a_ratio_above_one_is_a_row_where_we_are_faster_than_the_faster_variant() -> None:
    found = measuring.summary(
        {"ours": [10.0, 11.0, 40.0], "dynamic": [33.0, 22.0, 21.0], "static": [50.0, 60.0, 1.0]}
    )
    assert found["best_variant"] == "dynamic"
    assert found["ms"] == {"ours": 11.0, "dynamic": 22.0, "static": 50.0}
    assert found["ratio"] == 2.0
    assert found["ratio_of_rounds"] == [0.525, 3.3]
    assert found["ms_of_rounds"]["ours"] == [10.0, 40.0]


def test_numbers_that_disagree_end_the_program_before_anything_is_timed() -> None:
    expected = np.array([1.0, -200.0])
    assert measuring.require_agreement("row", np.array([1.0, -199.9]), expected) == pytest.approx(
        5e-4
    )
    for wrong in ([1.0, -199.7], [1.3, -200.0], [np.nan, -200.0]):
        with pytest.raises(SystemExit, match="row: the sides differ by"):
            measuring.require_agreement("row", np.array(wrong), expected)


def test_the_sides_take_turns_and_the_order_changes_every_round() -> None:
    called: list[str] = []

    def side(name: str, seconds: float) -> measuring.Timed:
        def timed() -> float:
            called.append(name)
            return seconds

        return timed

    row = measuring.Row(
        what="step: ms",
        units=2,
        difference=0.0,
        ours=side("ours", 0.010),
        theirs={"a": side("a", 0.040), "b": side("b", 0.030)},
        facts={"work": "none"},
        round_s=0.0,
        untimed=1,
    )
    found = measuring.measure(row, 2)
    assert called == ["ours", "ours", "a", "a", "b", "b", "b", "b", "a", "a", "ours", "ours"]
    assert found["ms"] == {"ours": 5.0, "a": 20.0, "b": 15.0}
    assert (found["ratio"], found["best_variant"], found["rounds"]) == (3.0, "b", 2)
    assert found["work"] == "none"
    assert json.loads(json.dumps(found)) == found
    called.clear()
    measuring.measure(dataclasses.replace(row, untimed=0), 1)
    assert called == ["ours", "a", "b"]


def test_an_interrupted_run_keeps_its_rows_and_the_next_one_goes_on(tmp_path: Path) -> None:
    path, order = tmp_path / "new" / "rows.json", ["first", "second", "third"]
    results = measuring.Results(path, HEAD)
    results.add("third", {"ratio": 3}, order=order)
    results.add("first", {"error": "out of memory"}, order=order)
    kept = json.loads(path.read_text())
    assert list(kept["rows"]) == ["first", "third"], (
        "in the order of their value, not of their coming"
    )
    assert kept["code"] == measuring.code_fingerprint()
    # Another load at the start is the same machine.
    again = measuring.Results(path, HEAD | {"hardware": {"cpu": "EPYC", "load_before": 1.5}})
    assert [name for name in order if again.missing(name)] == ["first", "second"]
    again.add("second", {"ratio": 2}, order=order)
    assert list(json.loads(path.read_text())["rows"]) == order


@pytest.mark.parametrize("other", [{"rounds": 7}, {"hardware": {"cpu": "Xeon"}}, {"code": "0"}])
def test_rows_of_another_machine_setting_or_code_are_not_continued(
    tmp_path: Path, other: dict[str, object]
) -> None:
    path = tmp_path / "rows.json"
    measuring.Results(path, HEAD).add("first", {"ratio": 1}, order=["first"])
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    assert measuring.Results(path, HEAD).missing("first")


def test_an_answer_ends_before_its_stop_token() -> None:
    assert measuring.until_stop([4, 5, 2, 7], {2, 3}) == [4, 5]
    assert measuring.until_stop([4, 5], {2}) == [4, 5]


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_without_torch_it_says_what_to_install(script: str) -> None:
    # Where the script imports its other side, and not before: nothing of torch is needed to load it.
    program = (
        "import runpy, sys\n"
        "sys.modules.update(torch=None, transformers=None)\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        f"sys.argv = [{script!r}, '--device', 'cpu', '--rounds', '1']\n"
        f"runpy.run_path({str(FOLDER / script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert 'pip install -e ".[parity]"' in done.stderr
    assert "Traceback" not in done.stderr
