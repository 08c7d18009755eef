"""Some hundreds of damaged PyTorch files; `python -m tools.fuzz_pth` tries more."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tools import fuzz_pth


def test_mutated_files_end_in_a_result_or_a_message(tmp_path: Path) -> None:
    report = fuzz_pth.fuzz(tmp_path, inputs=600, seed=11)
    assert report.crashes == []
    assert report.inputs == 600
    assert report.read > 20
    assert report.refused > 300


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(path: Path) -> Any:
        shell = f"touch {tmp_path / fuzz_pth.CANARY}".encode()
        return pickle.loads(b"cos\nsystem\n(S'%s'\ntR." % shell)

    monkeypatch.setattr(fuzz_pth, "PthSource", careless)
    report = fuzz_pth.fuzz(tmp_path, inputs=1, seed=0)
    assert "executed" in report.crashes[0]
    monkeypatch.setattr(fuzz_pth, "PthSource", lambda path: 1 / 0)
    assert "ZeroDivisionError" in fuzz_pth.fuzz(tmp_path, inputs=1, seed=0).crashes[0]
