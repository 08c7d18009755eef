"""checkpoint.py: trees come back bit for bit, in the dtype and place asked for; nothing half-written is ever read."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
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
    compare_trees,
    load_params,
    save_params,
    stored_tree,
)
from minigpt4_jax.config import UserError


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
    with pytest.raises(CheckpointError, match="has bytes 100, expected"):
        load_params(tmp_path / "params", abstract(tree))


def test_params_load_inside_a_running_event_loop(tmp_path: Path) -> None:
    tree = make_tree()
    save_params(tmp_path / "params", tree)

    async def in_a_notebook() -> Any:
        return load_params(tmp_path / "params", abstract(tree))

    assert_identical(asyncio.run(in_a_notebook()), tree)


# --- damage ---


def params_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_a_flipped_bit_anywhere_that_matters_is_found_and_named(tmp_path: Path) -> None:
    save_params(tmp_path / "params", make_tree())
    files = [f for f in params_files(tmp_path / "params") if f.name != "commit_success.txt"]
    assert len(files) > 4
    for file in files:
        if file.name in ("_CHECKPOINT_METADATA", "checksums.json"):
            continue  # Orbax reads neither; a flipped checksum blames a file, which is as safe
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            load_params(tmp_path / "params", abstract(make_tree()))
        name = file.relative_to(tmp_path / "params").as_posix()
        assert f"{name} has crc32 " in str(caught.value)
        assert "Remove it and make it again" in str(caught.value)
        file.write_bytes(whole)
    assert_identical(load_params(tmp_path / "params", abstract(make_tree())), make_tree())


def test_a_folder_of_an_older_version_is_read_and_the_log_says_unchecked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_params(tmp_path / "params", make_tree())
    (tmp_path / "params" / "checksums.json").unlink()
    assert_identical(load_params(tmp_path / "params", abstract(make_tree())), make_tree())
    assert [m for m in caplog.messages if "has no checksums" in m and "unchecked" in m]


def test_a_folder_of_a_newer_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    save_params(tmp_path / "params", make_tree())
    file = tmp_path / "params" / "checksums.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match=r"format 2; this version .* reads up to 1\. Update it"):
        load_params(tmp_path / "params", abstract(make_tree()))


def test_damage_without_checksums_is_a_clear_error_too(tmp_path: Path) -> None:
    save_params(tmp_path / "params", make_tree())
    (tmp_path / "params" / "checksums.json").unlink()
    largest = max(params_files(tmp_path / "params"), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read; remove it and make it again"):
        load_params(tmp_path / "params", abstract(make_tree()))


# --- disks ---


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        CheckpointError, match=r"has 1\.0 MB free; a checkpoint needs 1\.\d MB\. Free"
    ):
        save_params(tmp_path / "params", make_tree())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full. Free some space"),
        (ValueError("RESOURCE_EXHAUSTED: ... No space left on device"), "is full. Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full. Free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system. Expected a folder"),
        (ValueError("PERMISSION_DENIED: ... Permission denied"), "Permission denied. Expected a"),
    ],
)
def test_what_a_disk_does_to_a_save_is_one_message(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    with pytest.raises(CheckpointError) as caught:
        save_params(tmp_path / "params", make_tree())
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"File exists\. Expected a folder"):
        save_params(tmp_path / "file" / "params", make_tree())
