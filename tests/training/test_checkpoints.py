"""training/checkpoints.py: a resumed run continues bit for bit; a half-written or damaged step is never continued."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt4_jax import checkpoint
from minigpt4_jax.checkpoint import CheckpointError, compare_trees
from minigpt4_jax.checksums import NewerFormat
from minigpt4_jax.training import checkpoints as module
from minigpt4_jax.training.checkpoints import TrainCheckpoints


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_identical(actual: Any, expected: Any) -> None:
    assert compare_trees(actual, expected) == []
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def make_state() -> dict[str, Any]:
    params = {"llama_proj": {"kernel": jnp.linspace(0.0, 1.0, 12).reshape(3, 4)}}
    return {
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "key": jax.random.key_data(jax.random.key(3)),
        "step": jnp.int32(0),
    }


@jax.jit
def update(state: dict[str, Any]) -> dict[str, Any]:
    grads = jax.tree.map(jnp.sin, state["params"])
    updates, opt_state = optax.adamw(1e-3).update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return state | {"params": params, "opt_state": opt_state, "step": state["step"] + 1}


def test_a_fresh_run_has_nothing_to_restore(tmp_path: Path) -> None:
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.restore_latest(abstract(make_state())) is None


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    state = make_state()
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in range(1, 4):
            state = update(state)
            data_state = {"epoch": 0, "next": step * 8}
            checkpoints.save(step, state, data_state=data_state, meta={"seed": 42})
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        found = checkpoints.restore_latest(abstract(make_state()))
    assert found is not None
    assert (found.step, found.data_state, found.meta) == (3, {"epoch": 0, "next": 24}, {"seed": 42})
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert_identical(found.state, state)
    assert_identical(update(found.state), update(state))
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_state_may_be_donated_right_after_saving(tmp_path: Path) -> None:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    values = jnp.zeros((512, 512))
    with TrainCheckpoints(tmp_path, max_to_keep=9) as checkpoints:
        for number in range(4):
            checkpoints.save(number, {"x": values}, data_state={}, meta={})
            values = step(values)
        checkpoints.wait_until_finished()
        found = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((512, 512), jnp.float32)})
    assert found is not None
    assert (np.asarray(found.state["x"]) == found.step).all()


def test_a_half_written_step_is_never_restored(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import jax.numpy as jnp
        import orbax.checkpoint as ocp
        from minigpt4_jax.training.checkpoints import TrainCheckpoints
        checkpoints = TrainCheckpoints({str(tmp_path)!r}, max_to_keep=2)
        checkpoints.save(1, {{"x": jnp.zeros(4)}}, data_state={{}}, meta={{}})
        checkpoints.wait_until_finished()
        def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
        ocp.JsonCheckpointHandler.finalize = die
        ocp.PyTreeCheckpointHandler.finalize = die  # the arrays are written, the step is not
        checkpoints.save(2, {{"x": jnp.ones(4)}}, data_state={{}}, meta={{}})
        checkpoints.wait_until_finished()
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    left = [entry.name for entry in (tmp_path / "checkpoints").iterdir()]
    assert any(name.startswith("2.") for name in left), left
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest_step == 1
        found = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((4,), jnp.float32)})
        assert found is not None
        assert found.step == 1
        checkpoints.save(2, {"x": jnp.ones(4)}, data_state={}, meta={})
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_training_checkpoint_must_fit_in_dtypes_too(tmp_path: Path) -> None:
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(4)}, data_state={}, meta={})
        checkpoints.wait_until_finished()
        with pytest.raises(CheckpointError, match="dtype of x: is float32, expected bfloat16"):
            checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((4,), jnp.bfloat16)})


def test_meta_is_read_without_the_arrays(tmp_path: Path) -> None:
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest_meta() is None
        checkpoints.save(1, {"x": jnp.zeros(4)}, data_state={}, meta={"seed": 42})
        checkpoints.wait_until_finished()
        assert checkpoints.latest_meta() == {"seed": 42}


# --- damage ---

X = {"x": jax.ShapeDtypeStruct((500,), jnp.float32)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the steps 1, 2 and 3."""
    with TrainCheckpoints(tmp_path, max_to_keep=3) as checkpoints:
        for step in (1, 2, 3):
            x = jnp.arange(500.0) * step
            checkpoints.save(step, {"x": x}, data_state={"next": step}, meta={"seed": 42})
    return tmp_path


def step_files(run: Path, step: int) -> list[Path]:
    """Everything that is read when a step is restored."""
    never_read = ("commit_success.txt", "_CHECKPOINT_METADATA", "checksums.json")
    folder = run / "checkpoints" / str(step)
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in never_read)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def restore(run: Path) -> Any:
    with TrainCheckpoints(run, max_to_keep=3) as checkpoints:
        return checkpoints.restore_latest(X)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_in_any_file_is_refused_with_the_newest_good_step_and_how_to_go_on(
    run: Path, damage: Callable[[Path], None]
) -> None:
    files = step_files(run, 3)
    assert {"state", "data_state", "meta"} <= {f.relative_to(run).parts[2] for f in files}
    for file in files:
        whole = file.read_bytes()
        damage(file)
        with pytest.raises(CheckpointError) as caught:
            restore(run)
        message = str(caught.value)
        assert f"{run / 'checkpoints' / '3'} is damaged: " in message
        assert file.relative_to(run / "checkpoints" / "3").as_posix() in message
        assert (
            f"good step is 2. To continue from it, remove {run / 'checkpoints' / '3'} and"
            in message
        )
        file.write_bytes(whole)
    assert restore(run).step == 3


def test_the_way_back_that_the_message_names_works(run: Path) -> None:
    flip(step_files(run, 3)[0])
    flip(step_files(run, 2)[0])
    with pytest.raises(CheckpointError) as caught:
        restore(run)
    removed = [run / "checkpoints" / step for step in ("2", "3")]
    assert f"good step is 1. To continue from it, remove {removed[0]}, {removed[1]} and" in str(
        caught.value
    )
    for folder in removed:
        shutil.rmtree(folder)
    found = restore(run)
    assert (found.step, found.data_state) == (1, {"next": 1})
    np.testing.assert_array_equal(found.state["x"], np.arange(500.0))


def test_without_a_good_step_the_run_is_to_start_anew(run: Path) -> None:
    for step in (1, 2, 3):
        flip(step_files(run, step)[0])
    with pytest.raises(CheckpointError, match=r"no good older step\. Start in a new workdir"):
        restore(run)


def test_damaged_meta_is_not_returned_either(run: Path) -> None:
    flip(run / "checkpoints" / "3" / "meta" / "metadata")
    with (
        TrainCheckpoints(run, max_to_keep=3) as checkpoints,
        pytest.raises(CheckpointError, match="meta/metadata has crc32"),
    ):
        checkpoints.latest_meta()


def test_a_step_of_a_newer_version_is_refused(run: Path) -> None:
    file = run / "checkpoints" / "3" / "checksums.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(NewerFormat, match="format 9; this version"):
        restore(run)


def test_a_step_of_an_older_version_is_restored_and_the_log_says_unchecked(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoints" / "3" / "checksums.json").unlink()
    assert restore(run).step == 3
    assert [message for message in caplog.messages if "is read unchecked" in message]


def test_checksums_are_there_as_soon_as_the_step_is(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import jax.numpy as jnp
        import orbax.checkpoint as ocp
        from minigpt4_jax.training import checkpoints as module
        real = module.write_checksums
        def write_and_die(folder):
            real(folder)
            os.kill(os.getpid(), signal.SIGKILL)  # the step does not have its name yet
        checkpoints = module.TrainCheckpoints({str(tmp_path)!r}, max_to_keep=2)
        checkpoints.save(1, {{"x": jnp.zeros(4)}}, data_state={{}}, meta={{}})
        checkpoints.wait_until_finished()
        module.write_checksums = write_and_die
        checkpoints.save(2, {{"x": jnp.ones(4)}}, data_state={{}}, meta={{}})
        checkpoints.wait_until_finished()
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / "1" / "checksums.json").exists()
    assert not (tmp_path / "checkpoints" / "2").exists()


def test_a_disk_without_room_is_said_before_the_step_is_begun(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrainCheckpoints(run, max_to_keep=3) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
        with pytest.raises(
            CheckpointError, match=r"MB free; a checkpoint needs 1\.1 MB\. Free some"
        ):
            checkpoints.save(4, {"x": jnp.zeros(500)}, data_state={}, meta={})
    assert restore(run).step == 3


def test_a_disk_that_fills_up_while_a_step_is_written_leaves_the_step_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = TrainCheckpoints(run, max_to_keep=3)
    monkeypatch.setattr(module, "write_checksums", fail)
    checkpoints.save(4, {"x": jnp.zeros(500)}, data_state={}, meta={})
    with pytest.raises(CheckpointError, match="is full"):
        checkpoints.close()
    monkeypatch.undo()
    assert restore(run).step == 3
