"""training/nonfinite.py: an error with the step and every sample of its batch, and none where all is well."""

from __future__ import annotations

import json
from collections import UserList
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.sources import Example
from minigpt4_jax.training.nonfinite import require_finite


class Samples(UserList[str]):
    """Their names; the one called `gone` cannot be read any more."""

    def __getitem__(self, index: Any) -> Any:
        if self.data[index] == "gone":
            raise SampleFault("missing", "gone")
        return Example(name=self.data[index], exchanges=(), image_row=0)


PARTS = [Part("cats", Samples(["a", "b", "gone"])), Part("dogs", Samples(["c"] * 20))]  # type: ignore[arg-type]  # two methods of a source


def batch(*rows: tuple[int, int]) -> Any:
    source, index = zip(*rows, strict=True)
    return {"source": np.asarray(source, np.int32), "sample_index": np.asarray(index, np.int64)}


def test_finite_numbers_pass(tmp_path: Path) -> None:
    require_finite(3, loss=2.0, grad_norm=0.0, batch=batch((0, 0)), parts=PARTS, workdir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))]
)
def test_the_error_names_step_numbers_and_samples(
    loss: float, grad_norm: float, tmp_path: Path
) -> None:
    rows = batch((1, 4), (0, 1), (0, 2))
    with pytest.raises(UserError) as caught:
        require_finite(7, loss=loss, grad_norm=grad_norm, batch=rows, parts=PARTS, workdir=tmp_path)
    message = str(caught.value)
    assert f"loss of step 7 is {loss} and the length of its gradient {grad_norm}" in message
    assert "dogs[4] (c), cats[1] (b), cats[2]; all 3 are in" in message
    assert json.loads((tmp_path / "nonfinite_step_7_process_0.json").read_text())["samples"] == [
        {"source": "dogs", "index": 4, "name": "c"},
        {"source": "cats", "index": 1, "name": "b"},
        {"source": "cats", "index": 2, "name": None},
    ]


def test_a_large_batch_is_whole_in_the_file_and_the_message_says_so(tmp_path: Path) -> None:
    rows = batch(*((1, index) for index in range(20)))
    with pytest.raises(
        UserError, match=r"dogs\[7\] \(c\), \.\.\.; all 20 are in .*step_7_process_0\.json"
    ):
        require_finite(
            7, loss=float("nan"), grad_norm=1.0, batch=rows, parts=PARTS, workdir=tmp_path
        )
    assert (
        len(json.loads((tmp_path / "nonfinite_step_7_process_0.json").read_text())["samples"]) == 20
    )


def test_a_file_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 7 is nan.*could not be written: No such file"):
        require_finite(
            7,
            loss=float("nan"),
            grad_norm=1.0,
            batch=batch((1, 0)),
            parts=PARTS,
            workdir=tmp_path / "gone",
        )
