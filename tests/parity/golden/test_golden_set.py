"""The set itself: a folder without cases must not pass for a set that was compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_golden_set_holds_cases(golden: Any, golden_cases: dict[str, list[Any]]) -> None:
    folder: Path = golden.folder
    assert folder.is_dir(), (
        f"There is no folder {folder}; expected a golden set. Set MINIGPT4_GOLDEN to one, or unset it for tests/golden."
    )
    assert any(golden_cases.values()), (
        f"{folder} holds no case of {', '.join(golden_cases)}; expected a golden set: eva_vit/vit_*.npz, "
        "llama_*/forward.npz or minigpt4_noqf/cases.json with the files it names. Nothing was compared."
    )
