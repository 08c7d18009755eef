"""checkpoint.py: trees come back bit for bit, in the dtype and place asked for; nothing half-written is ever read."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax import checkpoint
from minigpt4_jax.checkpoint import (
    CheckpointError,
    TrainCheckpoints,
    compare_trees,
    load_params,
    save_params,
    stored_tree,
)


def make_tree() -> dict[str, Any]:
    generator = np.random.default_rng(0)

    def draw(*shape: int, dtype: Any = np.float32) -> Any:
        return generator.standard_normal(shape).astype(dtype)

    layers = {str(i): {"kernel": draw(8, 4), "scale": draw(8)} for i in range(11)}
    return {
        "llama": {"layers": layers, "embedding": draw(16, 8, dtype=np.float16)},
        "llama_proj": {"kernel": draw(4, 8, dtype=jnp.bfloat16), "bias": draw(8)},
        "steps": np.arange(3, dtype=np.int32),
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_identical(actual: Any, expected: Any) -> None:
    assert compare_trees(actual, expected) == []
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


# --- comparing ---


def test_equal_trees_have_no_differences() -> None:
    assert compare_trees(make_tree(), abstract(make_tree())) == []


def test_every_difference_is_listed_in_both_directions() -> None:
    actual, expected = make_tree(), make_tree()
    del actual["llama"]["layers"]["3"]["scale"]
    actual["llama"]["extra"] = np.zeros(2, np.float32)
    actual["llama_proj"]["kernel"] = actual["llama_proj"]["kernel"].T
    actual["llama_proj"]["bias"] = actual["llama_proj"]["bias"].astype(np.float16)
    assert sorted(compare_trees(actual, expected)) == [
        "dtype of llama_proj/bias: is float16, expected float32",
        "missing: llama/layers/3/scale float32[8]",
        "shape of llama_proj/kernel: is [8, 4], expected [4, 8]",
        "unexpected: llama/extra float32[2]",
    ]
    assert len(compare_trees(actual, expected, check_dtypes=False)) == 3


def test_optimizer_states_are_compared_by_name_too() -> None:
    params = {"kernel": np.zeros((2, 2), np.float32)}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    other = jax.eval_shape(optax.sgd(1e-3, momentum=0.9).init, params)
    assert compare_trees(state, state) == []
    assert any(line.startswith("missing: 0/mu/kernel") for line in compare_trees(other, state))


# --- parameter trees ---


def test_params_come_back_bit_for_bit_in_their_own_dtypes(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "new" / "params", tree)
    assert_identical(load_params(tmp_path / "new" / "params", abstract(tree)), tree)


def test_jax_arrays_are_saved_like_numpy_arrays(tmp_path: Path) -> None:
    tree = jax.tree.map(jnp.asarray, make_tree())
    save_params(tmp_path / "params", tree)
    assert_identical(load_params(tmp_path / "params", abstract(tree)), tree)


def test_reading_casts_floating_leaves_only(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "params", tree)
    read = load_params(tmp_path / "params", abstract(tree), dtype=jnp.bfloat16)
    assert read["steps"].dtype == np.int32
    expected = tree["llama"]["layers"]["10"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(read["llama"]["layers"]["10"]["kernel"], expected)


def test_reading_places_every_leaf_as_asked(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "params", tree)
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)
    shardings["llama"]["embedding"] = NamedSharding(mesh, P("fsdp"))
    read = load_params(tmp_path / "params", abstract(tree), shardings=shardings)
    assert_identical(read, tree)
    embedding = read["llama"]["embedding"]
    assert embedding.sharding == shardings["llama"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(8, 8)}


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "params", tree)
    wanted = abstract(tree)
    wanted["llama"]["embedding"] = jax.ShapeDtypeStruct((32, 8), jnp.float16)
    wanted["vit"] = {"cls_token": jax.ShapeDtypeStruct((1, 1, 8), jnp.float32)}
    del wanted["steps"]
    with pytest.raises(CheckpointError) as caught:
        load_params(tmp_path / "params", wanted)
    message = str(caught.value)
    assert "3 differences" in message
    assert "shape of llama/embedding: is [16, 8], expected [32, 8]" in message
    assert "missing: vit/cls_token float32[1, 1, 8]" in message
    assert "unexpected: steps int32[3]" in message


def test_what_is_stored_is_known_without_reading_it(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "params", tree)
    assert compare_trees(stored_tree(tmp_path / "params"), tree) == []


def test_saving_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    save_params(tmp_path / "params", make_tree())
    save_params(tmp_path / "params", {"kernel": np.ones(3, np.float32)})
    assert list(checkpoint.leaf_names(stored_tree(tmp_path / "params"))) == ["kernel"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["params"]


def test_saving_never_replaces_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        save_params(tmp_path / "thesis", make_tree())
    assert (tmp_path / "thesis" / "chapter1.txt").exists()


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    save_params(tmp_path / "params", {"kernel": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="object"):
        save_params(tmp_path / "params", {"kernel": object()})
    assert [entry.name for entry in tmp_path.iterdir()] == ["params"]
    load_params(tmp_path / "params", {"kernel": jax.ShapeDtypeStruct((3,), np.float32)})


def test_a_killed_save_leaves_nothing_that_passes_for_whole(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import numpy as np
        from minigpt4_jax import checkpoint
        checkpoint.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all written, not yet in place
        checkpoint.save_params({str(tmp_path / "params")!r}, {{"kernel": np.ones(3, np.float32)}})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".partial"]
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        stored_tree(tmp_path / "params")
    save_params(tmp_path / "params", {"kernel": np.ones(3, np.float32)})  # and sweeps the rubbish
    assert [entry.name for entry in tmp_path.iterdir()] == ["params"]


def test_a_folder_without_a_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=str(folder)):
            load_params(folder, {})


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "params", tree)
    largest = max((f for f in (tmp_path / "params").rglob("*") if f.is_file()), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_params(tmp_path / "params", abstract(tree))


def test_params_load_inside_a_running_event_loop(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "params", tree)

    async def in_a_notebook() -> Any:
        return load_params(tmp_path / "params", abstract(tree))

    assert_identical(asyncio.run(in_a_notebook()), tree)


# --- training runs ---


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
        assert checkpoints.latest_meta() is None


def test_the_meta_of_the_newest_step_is_read_whatever_its_arrays_are(tmp_path: Path) -> None:
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(), data_state={}, meta={"seed": step})
    with TrainCheckpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest_meta() == {"seed": 2}


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
        from minigpt4_jax.checkpoint import TrainCheckpoints
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
