"""training/quarantine.py: damage in any file of a step is found; what is set aside keeps all it had."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from minigpt4_jax.checkpoint import CheckpointError
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.quarantine import newest_whole_step, set_aside


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run with the steps 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("run")
    with TrainCheckpoints(workdir, max_to_keep=3) as checkpoints:
        for step in (1, 2, 3):
            x = jnp.arange(500.0) * step
            checkpoints.save(step, {"x": x}, data_state={"next": step}, meta={"seed": 42})
    return workdir / "checkpoints"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "checkpoints")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_damage_in_any_file_of_the_newest_step_is_found(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    files = [f for f in (folder / "3").rglob("*") if f.is_file()]
    inside = {f.relative_to(folder / "3").as_posix() for f in files}
    assert {"checksums.json", "_CHECKPOINT_METADATA", "commit_success.txt"} <= inside
    assert {"state", "data_state", "meta"} <= {name.partition("/")[0] for name in inside}
    for file in files:
        content = file.read_bytes()
        damage(file)
        found: dict[int, list[str]] = {}
        assert newest_whole_step(folder, found) == 2, file
        assert found[2] == []
        if file.name != "checksums.json":  # a bit in it speaks against the file that it is about
            assert file.relative_to(folder / "3").as_posix() in found[3][0]
        file.write_bytes(content)
    assert newest_whole_step(folder, {}) == 3


def test_a_file_too_many_is_damage(folder: Path) -> None:
    (folder / "3" / "state" / "more").touch()
    assert newest_whole_step(folder, {}) == 2


def test_what_is_known_is_not_looked_at_again(folder: Path) -> None:
    assert newest_whole_step(folder, {3: ["it burns"]}) == 2


def test_an_empty_folder_has_no_step_and_names_of_others_are_left_alone(folder: Path) -> None:
    for step in "123":
        (folder / step).rename(folder / f"{step}.orbax-checkpoint-tmp")
    assert newest_whole_step(folder, {}) is None


def test_every_damaged_step_is_listed_when_none_is_whole(folder: Path) -> None:
    for step in "123":
        flip(folder / step / "meta" / "metadata")
    with pytest.raises(CheckpointError, match=r"(?s)/3: meta.*/2: meta.*/1: meta"):
        newest_whole_step(folder, {})


def test_only_damaged_steps_newer_than_the_good_one_are_set_aside_with_all_they_had(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = {f.relative_to(folder / "3"): f.read_bytes() for f in (folder / "3").rglob("*.txt")}
    set_aside(folder, {3: ["it burns"], 2: [], 1: ["it burned"]}, good=2)
    assert sorted(f.name for f in folder.iterdir()) == ["1", "2", "3.corrupt"]
    aside = folder / "3.corrupt"
    assert {f.relative_to(aside): f.read_bytes() for f in aside.rglob("*.txt")} == before
    said = (
        f"{folder / '3'} is damaged: it burns. It is kept as {aside}; the run goes on from step 2."
    )
    assert said in capsys.readouterr().out
    assert said in caplog.text
