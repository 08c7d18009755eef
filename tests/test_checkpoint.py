"""checkpoint.py: every difference between two trees is listed; what disks do and what is damaged is one message.

Whole models on disk are tested in `tests/test_model_folder.py` and `tests/convert/test_model.py`, the steps of a
training run in `tests/training/test_checkpoints.py`.
"""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minigpt4_jax import checkpoint
from minigpt4_jax.checkpoint import (
    CheckpointError,
    compare_trees,
    find_damage,
    listed,
    readable,
    require_room,
    require_same_trees,
    writable,
)
from minigpt4_jax.checksums import write_checksums


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


def test_a_tree_of_another_model_is_refused_with_every_difference() -> None:
    tree, wanted = make_tree(), abstract(make_tree())
    wanted["llama"]["embedding"] = jax.ShapeDtypeStruct((32, 8), jnp.float16)
    wanted["vit"] = {"cls_token": jax.ShapeDtypeStruct((1, 1, 8), jnp.float32)}
    del wanted["steps"]
    with pytest.raises(CheckpointError) as caught:
        require_same_trees(tree, wanted, what="The file")
    message = str(caught.value)
    assert "The file does not fit the model (3 differences)" in message
    assert "shape of llama/embedding: is [16, 8], expected [32, 8]" in message
    assert "missing: vit/cls_token float32[1, 1, 8]" in message
    assert "unexpected: steps int32[3]" in message
    require_same_trees(tree, abstract(tree), what="The file")


# --- damage ---


def test_a_folder_of_an_older_version_is_read_and_the_log_says_unchecked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "array").write_bytes(b"12345")
    assert find_damage(tmp_path) == []
    assert [m for m in caplog.messages if "has no checksums" in m and "unchecked" in m]
    write_checksums(tmp_path)
    (tmp_path / "array").write_bytes(b"12346")
    assert [line.split()[:3] for line in find_damage(tmp_path)] == [["array", "has", "crc32"]]


def test_many_problems_become_one_line() -> None:
    assert listed(["a", "b"]) == "a; b"
    assert listed(list("abcdef")) == "a; b; c; d; and 2 more"


def test_whatever_a_damaged_file_raises_is_one_message(tmp_path: Path) -> None:
    with (
        pytest.raises(
            CheckpointError, match=r"cannot be read; remove it and make it again. \(odd\)"
        ),
        readable(tmp_path),
    ):
        raise NotImplementedError("odd\nand more")


# --- disks ---


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        CheckpointError, match=r"has 1\.0 MB free; a checkpoint needs 1\.\d MB\. Free"
    ):
        require_room(tmp_path, make_tree())


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
    error: Exception, said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught, writable(tmp_path / "run"):
        raise error
    assert said in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


def test_a_mistake_of_ours_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another reason"), writable(tmp_path):
        raise ValueError("another reason")
