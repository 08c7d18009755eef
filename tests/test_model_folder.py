"""A model folder is read onto any devices, in either layout, exactly; and a wrong one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.checkpoint import CheckpointError
from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.model_folder import MANIFEST, WEIGHTS, ModelFolder, file_of
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests.tiny_folder import write_folder

TINY = PRESETS["tiny"]


@pytest.fixture
def folder(tmp_path: Path, tiny_params: Any) -> Path:
    return write_folder(tmp_path / "model", tiny_params, preset=TINY)


def abstract(config: ModelConfig, *, stacked: bool = False) -> Any:
    tree = jax.tree.map(lambda leaf: leaf, abstract_params(config))  # a copy: tests take leaves out
    if not stacked:
        return tree
    return jax.eval_shape(lambda t: convert_layout(t, DISK, TRAIN, llama=config.llama), tree)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_layers_have_files_of_their_own() -> None:
    assert file_of("llama/layers/12/mlp/up_proj/kernel") == "llama.layers.12"
    assert file_of("llama/norm/scale") == file_of("llama/embed_tokens/embedding") == "llama"
    assert file_of("query_tokens") == "query_tokens"


def test_the_folder_gives_its_preset_and_every_parameter(folder: Path, tiny_params: Any) -> None:
    opened = ModelFolder(folder)
    assert opened.preset == TINY
    assert opened.sources == {"vit": {"files": []}}
    assert_same(opened.load(abstract(TINY.model)), tiny_params)


def test_layers_are_stacked_while_they_are_read(folder: Path, tiny_params: Any) -> None:
    stacked = ModelFolder(folder).load(abstract(TINY.model, stacked=True))
    assert_same(stacked, convert_layout(tiny_params, DISK, TRAIN, llama=TINY.model.llama))


def test_a_part_is_loaded_alone_and_cast(folder: Path, tiny_params: Any) -> None:
    only = {"llama": abstract(TINY.model)["llama"]}
    read = ModelFolder(folder).load(only, dtype=jnp.bfloat16)
    assert read.keys() == {"llama"}
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(read["llama"], jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params["llama"]))


@pytest.mark.parametrize("stacked", [False, True])
def test_every_device_reads_its_slice_and_nothing_else(
    folder: Path, tiny_params: Any, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = np.asarray(jax.devices()[:2])
    assert len(devices) == 2
    mesh = jax.sharding.Mesh(devices, ("tensor",))
    tree = {"llama": abstract(TINY.model, stacked=stacked)["llama"]}
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, P(*[None] * (len(leaf.shape) - 1), "tensor")), tree
    )
    opened = ModelFolder(folder)
    read: list[int] = []
    original = type(next(iter(opened._files.values()))).read

    def counted(self: Any, name: str, index: Any = ()) -> Any:
        part = original(self, name, index)
        read.append(part.size)
        return part

    monkeypatch.setattr("minigpt4_jax.model_folder.WeightFile.read", counted)
    loaded = opened.load(tree, shardings=shardings)
    whole = (
        convert_layout(tiny_params, DISK, TRAIN, llama=TINY.model.llama) if stacked else tiny_params
    )
    assert_same(loaded, {"llama": whole["llama"]})
    assert all(
        leaf.sharding == s
        for leaf, s in zip(*map(jax.tree.leaves, (loaded, shardings)), strict=True)
    )
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(loaded))
    assert max(read) <= max(leaf.size for leaf in jax.tree.leaves(tiny_params["llama"])) // 2


def test_a_folder_in_a_bucket_reads_like_one_on_a_disk(folder: Path, tiny_params: Any) -> None:
    fs = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"/models/tiny/{file.relative_to(folder).as_posix()}", file.read_bytes())
    opened = ModelFolder("memory://models/tiny")
    opened.require_whole()
    assert_same(opened.load(abstract(TINY.model)), tiny_params)


def test_a_folder_of_another_model_is_refused_with_every_difference(folder: Path) -> None:
    tree = abstract(PRESETS["smol"].model)
    with pytest.raises(CheckpointError) as caught:
        ModelFolder(folder).load(tree)
    text = str(caught.value)
    assert "missing: llama/layers/29/mlp/up_proj/kernel" in text
    assert "shape of llama/norm/scale: is [32], expected [576]" in text


def test_a_parameter_too_many_is_refused(folder: Path) -> None:
    tree = abstract(TINY.model)
    del tree["llama"]["layers"]["1"]
    with pytest.raises(CheckpointError, match="unexpected: llama/layers/1/"):
        ModelFolder(folder).load(tree)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_layer_that_is_missing_is_refused(
    tmp_path: Path, tiny_params: Any, stacked: bool
) -> None:
    params = {
        **tiny_params,
        "llama": {**tiny_params["llama"], "layers": dict(tiny_params["llama"]["layers"])},
    }
    del params["llama"]["layers"]["0"]
    opened = ModelFolder(write_folder(tmp_path / "model", params, preset=TINY))
    with pytest.raises(CheckpointError, match="llama/layers/"):
        opened.load(abstract(TINY.model, stacked=stacked))


def test_a_flipped_bit_in_any_file_is_found_and_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    write_checksums(folder)
    opened = ModelFolder(folder)
    opened.require_whole()
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "checksums.json"]
    assert {"manifest.json", "tokenizer.json", "llama.layers.0.safetensors"} <= {
        file.name for file in files
    }
    for file in files:
        whole = file.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        name = file.relative_to(folder).as_posix()
        with pytest.raises(CheckpointError, match=f"{name} has crc32 .*Copy or convert it again"):
            opened.require_whole()
        file.write_bytes(whole)
    opened.require_whole()


def test_files_that_were_cut_or_lost_are_named(folder: Path) -> None:
    opened = ModelFolder(folder)
    file = folder / WEIGHTS / "llama.layers.0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    (folder / WEIGHTS / "vit.blocks.0.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        opened.require_whole()
    assert "llama.layers.0.safetensors has bytes 100, expected" in str(caught.value)
    assert "vit.blocks.0.safetensors is missing" in str(caught.value)


def test_a_cut_file_is_not_read_unchecked_either(folder: Path) -> None:
    file = folder / WEIGHTS / "llama.layers.0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        ModelFolder(folder).load(abstract(TINY.model))


def test_a_folder_of_a_newer_version_is_refused_with_the_way_out(folder: Path) -> None:
    file = folder / "checksums.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(UserError, match=r"format 3; this version .* reads up to 2\. Update it"):
        ModelFolder(folder).require_whole()


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_without_its_list_of_files_a_folder_is_damaged(folder: Path, text: str | None) -> None:
    (folder / "checksums.json").unlink()
    if text is not None:
        (folder / "checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checksums\.json cannot be read"):
        ModelFolder(folder).names()
    with pytest.raises(CheckpointError, match=r"is damaged: .*checksums\.json"):
        ModelFolder(folder).require_whole()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "does not say 'minigpt4_jax.model'"),
        (lambda m: m.update(version=99), "has the version 99"),
        (lambda m: m["preset"].pop("template"), "lacks .'template'"),
        (lambda m: m["preset"]["model"]["llama"].update(extra=1), "unknown fields .'extra'"),
        (lambda m: m["preset"]["model"].update(llama=3), "LlamaConfig is 3"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    folder: Path, change: Any, message: str
) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        ModelFolder(folder)


def test_what_is_no_folder_and_what_is_no_json_is_said(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="is no model folder"):
            ModelFolder(path)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        ModelFolder(folder)
