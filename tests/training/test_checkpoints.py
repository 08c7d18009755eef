"""training/checkpoints.py: a resumed run continues bit for bit; a half-written or damaged step is never continued."""

from __future__ import annotations

import errno
import os
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
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=300)
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


def restore(run: Path) -> Any:
    with TrainCheckpoints(run, max_to_keep=3) as checkpoints:
        return checkpoints.restore_latest(X)


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_step_is_set_aside_and_the_one_before_is_restored(
    run: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "checkpoints" / "3"
    file = max((f for f in (folder / "state").rglob("*") if f.is_file()), key=os.path.getsize)
    damage(file)
    found = restore(run)
    assert (found.step, found.data_state) == (2, {"next": 2})
    np.testing.assert_array_equal(found.state["x"], np.arange(500.0) * 2)
    said = capsys.readouterr().out
    assert f"{folder} is damaged: {file.relative_to(folder).as_posix()} " in said
    assert f"kept as {folder}.corrupt; the run goes on from step 2." in said
    assert names(run) == ["1", "2", "3.corrupt"]
    assert restore(run).step == 2
    assert capsys.readouterr().out == ""


def test_a_missing_item_sets_the_step_aside(run: Path) -> None:
    for item in ("state", "data_state", "meta"):
        newest = max(int(name) for name in names(run) if name.isdecimal())
        shutil.rmtree(run / "checkpoints" / str(newest) / item)
        if newest > 1:
            assert restore(run).step == newest - 1
    with pytest.raises(CheckpointError, match="Every training checkpoint"):
        restore(run)


def test_a_run_that_fell_back_saves_the_same_step_again(run: Path) -> None:
    for _ in range(2):
        flip(run / "checkpoints" / "3" / "meta" / "metadata")
        with TrainCheckpoints(run, max_to_keep=3) as checkpoints:
            found = checkpoints.restore_latest(X)
            assert found is not None
            assert found.step == 2
            checkpoints.save(3, {"x": jnp.zeros(500)}, data_state={}, meta={})
    assert names(run) == ["1", "2", "3", "3.corrupt", "3.corrupt2"]


def test_without_a_whole_step_the_run_is_refused_and_nothing_is_renamed(run: Path) -> None:
    for step in "123":
        flip(run / "checkpoints" / step / "meta" / "metadata")
    with pytest.raises(CheckpointError) as caught:
        restore(run)
    for step in "123":
        assert f"{run / 'checkpoints' / step}: meta/metadata has sha256" in str(caught.value)
    assert "from a copy, or start in a new workdir" in str(caught.value)
    assert names(run) == ["1", "2", "3"]


def test_meta_comes_from_the_step_that_will_be_restored_and_renames_nothing(run: Path) -> None:
    with TrainCheckpoints(run, max_to_keep=3) as checkpoints:
        checkpoints.save(4, {"x": jnp.zeros(500)}, data_state={}, meta={"seed": 43})
    flip(run / "checkpoints" / "4" / "meta" / "metadata")
    with TrainCheckpoints(run, max_to_keep=3) as checkpoints:
        assert checkpoints.latest_meta() == {"seed": 42}
        assert names(run) == ["2", "3", "4"]


def test_a_step_of_another_tree_is_refused_and_not_set_aside(run: Path) -> None:
    flip(run / "checkpoints" / "3" / "meta" / "metadata")
    with TrainCheckpoints(run, max_to_keep=3) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"^The training checkpoint .*/2 does not fit the"
        ):
            checkpoints.restore_latest({"y": X["x"]})
        assert names(run) == ["1", "2", "3"]


def test_a_step_of_a_newer_version_is_refused(run: Path) -> None:
    file = run / "checkpoints" / "3" / "checksums.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 9'))
    with pytest.raises(NewerFormat, match="format 9; this version"):
        restore(run)
    assert names(run) == ["1", "2", "3"]


def test_a_run_of_an_older_version_is_restored_and_the_log_says_unchecked(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in "123":
        (run / "checkpoints" / step / "checksums.json").unlink()
    assert restore(run).step == 3
    assert [message for message in caplog.messages if "is read unchecked" in message]


def test_what_orbax_finds_in_an_unchecked_step_sets_it_aside_too(run: Path) -> None:
    for step in "123":
        (run / "checkpoints" / step / "checksums.json").unlink()
    shutil.rmtree(run / "checkpoints" / "3" / "state")
    assert restore(run).step == 2
    assert names(run) == ["1", "2", "3.corrupt"]


def test_checksums_are_there_as_soon_as_the_step_is(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import jax.numpy as jnp
        import orbax.checkpoint as ocp
        from minigpt4_jax.training import checkpoints as module
        real = module.write_checksums
        def write_and_die(folder, **kind):
            real(folder, **kind)
            os.kill(os.getpid(), signal.SIGKILL)  # the step does not have its name yet
        checkpoints = module.TrainCheckpoints({str(tmp_path)!r}, max_to_keep=2)
        checkpoints.save(1, {{"x": jnp.zeros(4)}}, data_state={{}}, meta={{}})
        checkpoints.wait_until_finished()
        module.write_checksums = write_and_die
        checkpoints.save(2, {{"x": jnp.ones(4)}}, data_state={{}}, meta={{}})
        checkpoints.wait_until_finished()
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=300)
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
    def fail(folder: Path, **kind: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = TrainCheckpoints(run, max_to_keep=3)
    monkeypatch.setattr(module, "write_checksums", fail)
    checkpoints.save(4, {"x": jnp.zeros(500)}, data_state={}, meta={})
    with pytest.raises(CheckpointError, match="is full"):
        checkpoints.close()
    monkeypatch.undo()
    assert restore(run).step == 3


def test_processes_meet_behind_a_save_for_longer_than_a_save_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the same time for both, the one whose save failed gave up just before the others came (two real processes).
    waited: dict[str, int] = {}

    def barrier(*, key: str, timeout_ms: int) -> None:
        waited[key] = timeout_ms

    monkeypatch.setattr(module.ocp.multihost, "get_barrier_sync_fn", lambda: barrier)
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        checkpoints.save(1, make_state(), data_state={}, meta={})
        checkpoints.wait_until_finished()
    limits = {key.rpartition(":")[2]: limit for key, limit in waited.items()}
    assert set(limits) == {"set_value_start", "set_value_end"}
    assert min(limits.values()) > module.SAVE_S * 1000
