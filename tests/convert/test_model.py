"""A model folder is written whole or not at all, goes on where it stopped, and holds what the sources hold."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import model as model_module
from convert.model import write_model
from convert.problems import ConversionError
from convert.rules import Op, Plan, Rule, flatten, identity, transpose
from convert.sources import ArraySource
from minigpt4_jax.config import UserError
from minigpt4_jax.model_folder import ModelFolder, file_of
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS

Arrays = dict[str, np.ndarray]
TINY = PRESETS["tiny"]


class FileSource(ArraySource):
    """Arrays that are said to come from a file."""

    def __init__(self, arrays: Arrays, path: Path) -> None:
        super().__init__(arrays)
        self._path = path
        if not path.exists():  # it keeps its time, as a user's file does
            path.write_bytes(b"".join(x.tobytes() for x in arrays.values()))
        self.read: list[str] = []

    def get(self, name: str) -> np.ndarray:
        self.read.append(name)
        return super().get(name)

    def files(self) -> tuple[Path, ...]:
        return (self._path,)


def rules_of(tree: Any) -> tuple[Rule, ...]:
    """Kernels come transposed and everything else as it is, under its own path with dots."""
    return tuple(
        Rule(path, (path.replace("/", "."),), transpose if len(leaf.shape) == 2 else identity)
        for path, leaf in flatten(tree)
    )


def arrays_of(tree: Any, dtype: Any, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        path.replace("/", "."): rng.normal(size=leaf.shape[::-1] if len(leaf.shape) == 2 else leaf.shape).astype(dtype)
        for path, leaf in flatten(tree)
    }  # fmt: skip


@pytest.fixture
def trees() -> dict[str, Any]:
    abstract = abstract_params(TINY.model)
    return {
        "vit": {"vit": abstract["vit"], "ln_vision": abstract["ln_vision"]},
        "llama": {"llama": abstract["llama"], "llama_proj": abstract["llama_proj"]},
    }


@pytest.fixture
def make(tmp_path: Path, trees: dict[str, Any]) -> Callable[..., Any]:
    """Converts the tiny model; `change` may spoil the arrays of a part first."""

    def make(
        out: str = "out", change: Callable[[str, Arrays], None] = lambda part, arrays: None
    ) -> tuple[Any, dict[str, FileSource]]:
        sources = {}
        for part, dtype in (("vit", np.float16), ("llama", ml_dtypes.bfloat16)):
            arrays = arrays_of(trees[part], dtype, len(part))
            change(part, arrays)
            sources[part] = FileSource(arrays, tmp_path / f"{part}.bin")
        plans = {
            part: Plan(source, rules_of(trees[part]), excuses=(), target=trees[part])
            for part, source in sources.items()
        }
        done = write_model(
            tmp_path / out, plans, preset=TINY, tokenizer=lambda folder: (folder / "tokenizer.json").write_text("{}"),
            facts={"vit": {"licence": "MIT"}}, settings={}, progress=lambda *_: None,
        )  # fmt: skip
        return done, sources

    return make


def test_the_folder_holds_every_parameter_in_the_dtype_of_its_source(
    make: Any, tmp_path: Path, trees: dict[str, Any]
) -> None:
    done, sources = make()
    folder = ModelFolder(tmp_path / "out")
    folder.require_whole()
    assert folder.preset == TINY
    held = {path for tree in trees.values() for path, _ in flatten(tree)}
    assert set(folder.names()) == held
    assert done.kept == 0
    for part, tree in trees.items():
        for path, leaf in flatten(tree):
            source = sources[part]._arrays[path.replace("/", ".")]
            value = folder.get(path)
            assert value.dtype == source.dtype
            np.testing.assert_array_equal(value, source.T if len(leaf.shape) == 2 else source)
    layer = load_file(tmp_path / "out" / "weights" / "llama.layers.1.safetensors")
    assert layer
    assert all(name.startswith("llama/layers/1/") for name in layer)


def test_the_manifest_says_where_everything_came_from(make: Any, tmp_path: Path) -> None:
    make()
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert sources["vit"]["licence"] == "MIT"
    data = (tmp_path / "llama.bin").read_bytes()
    assert sources["llama"]["files"] == [
        {"name": "llama.bin", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    ]


def test_an_interrupted_conversion_leaves_nothing_that_loads_and_goes_on_with_what_is_whole(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("whole")
    written: list[str] = []
    write = model_module.write_safetensors

    def cut_short(path: Path, entries: Any) -> Any:
        if len(written) == 3:
            path.with_suffix(".half").write_bytes(b"half a layer")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, entries)

    monkeypatch.setattr(model_module, "write_safetensors", cut_short)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is no model folder"):
        ModelFolder(tmp_path / ".out.partial")
    # One of the three is damaged meanwhile: it is made again with the rest.
    damaged = tmp_path / ".out.partial" / "weights" / written[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    again: list[str] = []
    monkeypatch.setattr(
        model_module, "write_safetensors", lambda p, e: (again.append(p.name), write(p, e))[1]
    )
    done, _ = make()
    assert done.kept == 2
    assert set(written[:3]) & set(again) == {written[1]}
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            same = tmp_path / "out" / file.relative_to(tmp_path / "whole")
            assert same.read_bytes() == file.read_bytes(), file
    assert not (tmp_path / ".out.partial").exists()


def test_what_was_made_from_another_file_is_not_kept(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = model_module.write_safetensors
    count = iter(range(100))

    def cut_short(path: Path, entries: Any) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt
        return write(path, entries)

    monkeypatch.setattr(model_module, "write_safetensors", cut_short)
    with pytest.raises(KeyboardInterrupt):
        make()
    monkeypatch.setattr(model_module, "write_safetensors", write)
    (tmp_path / "vit.bin").unlink()  # the new one has another time
    done, _ = make()
    assert done.kept == 0


def test_no_tensor_is_read_before_every_name_is_right(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    def spoil(part: str, arrays: Arrays) -> None:
        if part == "llama":
            del arrays["llama.norm.scale"]
        else:
            arrays["vit.extra"] = np.ones(1)

    original = FileSource.get
    monkeypatch.setattr(
        FileSource, "get", lambda self, name: (read.append(name), original(self, name))[1]
    )
    with pytest.raises(ConversionError) as caught:
        make(change=spoil)
    found = {p.text.split()[0] for p in caught.value.problems}
    assert found == {"llama.norm.scale", "vit.extra"}
    assert read == []
    assert not (tmp_path / ".out.partial").exists()


def test_every_wrong_value_is_reported_and_its_layer_is_not_written(
    make: Any, tmp_path: Path
) -> None:
    def spoil(part: str, arrays: Arrays) -> None:
        if part == "vit":
            arrays["vit.blocks.0.norm1.scale"][0] = np.nan
        else:
            arrays["llama.layers.1.mlp.up_proj.kernel"][0, 0] = np.inf

    with pytest.raises(ConversionError) as caught:
        make(change=spoil)
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out").exists()
    weights = tmp_path / ".out.partial" / "weights"
    assert not (weights / "vit.blocks.0.safetensors").exists()
    assert not (weights / "llama.layers.1.safetensors").exists()


def test_a_folder_that_is_there_is_left_alone(make: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        make()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_disk_without_room_is_said_before_anything_is_converted(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(model_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB free; the model needs"):
        make()
    assert not list((tmp_path / ".out.partial" / "weights").iterdir())


def test_two_conversions_into_one_folder_do_not_meet(make: Any, tmp_path: Path) -> None:
    with (
        model_module._locked(tmp_path / ".out.partial"),
        pytest.raises(UserError, match="Another process is converting"),
    ):
        make()


def test_memory_holds_two_files_of_weights_and_no_more(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is being written, and the one that is being made meanwhile."""
    alive: dict[int, str] = {}
    most: list[set[str]] = []
    written: set[str] = set()
    plan_make, write = Plan.make, model_module.write_safetensors

    def made(self: Plan, step: Any) -> Any:
        value, problems = plan_make(self, step)
        assert value is not None
        if step.rule.op is transpose:  # a copy; what is taken as it is belongs to the source
            number = len(most)
            alive[number] = file_of(step.path)
            weakref.finalize(value, alive.pop, number)
            end = time.monotonic() + 60
            # The thread that wrote a file lets go of it a moment behind its last word.
            while written & set(alive.values()) and time.monotonic() < end:
                time.sleep(0.001)
            most.append(set(alive.values()))
        return value, problems

    def slow(path: Path, entries: Any) -> Any:
        time.sleep(0.02)  # the next file is made before this one is written
        found = write(path, entries)
        written.add(path.name.removesuffix(".safetensors"))
        return found

    monkeypatch.setattr(Plan, "make", made)
    monkeypatch.setattr(model_module, "write_safetensors", slow)
    make()
    assert len(set.union(*most)) > 4
    assert max(map(len, most)) == 2


def test_an_operation_that_widens_its_result_is_stored_wide(tmp_path: Path) -> None:
    wide = Op("to float32", lambda x: x.astype(np.float32))
    tree = {"vit": {"pos_embed": np.empty(3)}}
    source = FileSource({"p": np.ones(3, np.float16)}, tmp_path / "p.bin")
    plan = Plan(source, (Rule("vit/pos_embed", ("p",), wide),), excuses=(), target=tree)
    write_model(
        tmp_path / "out",
        {"vit": plan},
        preset=TINY,
        tokenizer=lambda _: None,
        facts={},
        settings={},
        progress=lambda *_: None,
    )
    assert ModelFolder(tmp_path / "out").dtype("vit/pos_embed") == np.float32
