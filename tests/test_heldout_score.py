"""benchmarks/smol_heldout.py: what counts as a right name and a right category."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "smol_heldout.py"
spec = importlib.util.spec_from_file_location("smol_heldout", SCRIPT)
assert spec is not None
assert spec.loader is not None
heldout = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heldout)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("This is a dog.", "dog"),
        ("These are some cherries. They are red.", "cherries"),
        ("This is a pair of jeans", "jeans"),
        ("An Apple", "apple"),
        ("This is a hot dog, a food.", "hot dog"),
    ],
)
def test_the_name_is_the_first_sentence_without_its_lead(answer: str, name: str) -> None:
    assert heldout.normalised_name(answer) == name


def test_only_the_exact_name_is_right_and_an_unknown_name_has_no_category() -> None:
    items = [
        {"code_point": "1", "name": "dog", "category": "animals"},
        {"code_point": "2", "name": "cat", "category": "animals"},
        {"code_point": "3", "name": "bread", "category": "food"},
        {"code_point": "4", "name": "pizza", "category": "food"},
    ]
    answers = ["This is a dog.", "This is a dog.", "This is a dog.", "This is a doggy."]
    result = heldout.score(items, answers)
    assert result["name"] == 1 / 4
    assert result["category"] == 2 / 4
    assert result["unknown_names"] == 1 / 4
    assert result["by_category"]["food"] == {"pictures": 2, "name": 0.0, "category": 0.0}
