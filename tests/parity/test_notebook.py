"""The notebook's cells are run in order, in one namespace, beside its pictures: what CI does not run does not exist.

Plain Python without a kernel (33 packages that nothing else needs), so the notebook has no magics and no `await`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "minigpt4.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.usefixtures("kept_programs")
def test_every_cell_runs_and_does_what_the_text_beside_it_says(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    names = {}
    for number, source in enumerate(CODE):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert "coffee" in names["answers"][0].lower()
    assert len(names["answers"]) == 4
    assert names["poem"]
    assert len({answer.text for answer in names["samples"]}) > 1
    assert "coffee" in names["ranked"][0].candidate
    assert names["embeds"].shape == (2, 16, 576)
    assert names["model"].image_cache.misses == 2
    assert names["chat"].finish_reason == "stop"


def test_the_notebook_shows_the_ways_to_ask_and_keeps_no_output():
    used = set(re.findall(r"\bmodel\.(\w+)\(", "\n".join(CODE)))
    assert used >= {"generate", "stream", "score", "embed_images", "start_chat"}
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
