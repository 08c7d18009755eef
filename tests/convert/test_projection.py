"""A projection goes to a file and back unchanged, and never into a model it was not made for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import projection
from convert.problems import ConversionError
from convert.projection import ProjectionInfo, read_projection, write_projection
from convert.sources import ArraySource
from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.presets import PRESETS
from tests.torch_files import write_pth

QFORMER = PRESETS["tiny-qformer"].model.qformer
assert QFORMER is not None


@pytest.fixture
def tree(any_config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    width = any_config.llama.width
    return {
        "kernel": rng.normal(size=(any_config.projection_in, width)).astype(np.float32),
        "bias": rng.normal(size=width).astype(np.float32),
    }


@pytest.fixture
def info(any_config: ModelConfig) -> ProjectionInfo:
    return ProjectionInfo(
        config=any_config,
        licence="CC-BY-4.0",
        attribution="drawn by hand",
        frozen_parts={"llama": "ab" * 32},
        training={"steps": 3, "loss": 1.5},
    )


def test_file_and_back_is_exact_and_says_what_it_is(
    tmp_path: Path, tree: Any, info: ProjectionInfo
) -> None:
    path = tmp_path / "p.safetensors"
    write_projection(path, tree, info=info)
    read, said = read_projection(path, info.config)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(read[leaf], tree[leaf])
    assert said == info


def test_a_header_from_before_the_qformer_is_that_of_a_model_without_one(
    tmp_path: Path, tree: Any, info: ProjectionInfo
) -> None:
    path = tmp_path / "p.safetensors"
    write_projection(path, tree, info=info)
    with safe_open(path, "numpy") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    del config["qformer"]
    save_file(load_file(path), path, metadata={**header, "config": json.dumps(config)})
    if info.config.qformer is None:
        assert read_projection(path, info.config)[1] == info
    else:
        with pytest.raises(UserError, match=r"header of .* cannot be read"):
            read_projection(path, info.config)


def test_a_projection_of_the_same_shape_for_another_image_path_is_refused(
    tmp_path: Path, tree: Any, info: ProjectionInfo, any_config: ModelConfig
) -> None:
    path = tmp_path / "p.safetensors"
    write_projection(path, tree, info=info)
    width = any_config.projection_in
    queries = dataclasses.replace(QFORMER, width=width, num_heads=1, num_queries=9)
    other = dataclasses.replace(any_config, qformer=queries, patches_per_token=None)
    with pytest.raises(UserError, match=r"qformer.num_queries is (None|5), the model has 9"):
        read_projection(path, other)


def test_file_keeps_the_released_names_and_layout(
    tmp_path: Path, tree: Any, info: ProjectionInfo
) -> None:
    write_projection(tmp_path / "p.safetensors", tree, info=info)
    arrays = load_file(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(arrays["llama_proj.weight"], tree["kernel"].T)
    np.testing.assert_array_equal(arrays["llama_proj.bias"], tree["bias"])


@pytest.mark.parametrize(("dtype", "relative"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_file_is_rounded_once(
    tmp_path: Path, tree: Any, info: ProjectionInfo, dtype: str, relative: float
) -> None:
    path = tmp_path / "p.safetensors"
    write_projection(path, tree, info=info, dtype=dtype)
    read, _ = read_projection(path, info.config)
    assert read["kernel"].dtype == np.float32
    np.testing.assert_allclose(read["kernel"], tree["kernel"], rtol=relative, atol=1e-7)
    stored, _ = read_projection(path, info.config, dtype=None)
    assert str(stored["kernel"].dtype) == dtype


def test_released_form_is_read(tmp_path: Path, tree: Any, info: ProjectionInfo) -> None:
    path = tmp_path / "released.safetensors"
    inv_freq = "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(projection.to_released(tree) | {inv_freq: np.ones(4, np.float32)}, path)
    read, said = read_projection(path, info.config)
    np.testing.assert_array_equal(read["kernel"], tree["kernel"])
    assert said is None


def test_projection_of_another_model_is_named(tmp_path: Path, info: ProjectionInfo) -> None:
    path = tmp_path / "vicuna.safetensors"
    weight = np.zeros((4096, 768), np.float16)
    save_file({"llama_proj.weight": weight, "llama_proj.bias": weight[:, 0].copy()}, path)
    needed = f"{info.config.projection_in} -> {info.config.llama.width}"
    with pytest.raises(UserError, match=rf"768 -> 4096 and fits Vicuna-7B.* needs {needed}"):
        read_projection(path, info.config)


def model_of(pair: tuple[int, int], config: ModelConfig) -> ModelConfig:
    """A config whose projection has these sizes."""
    into, out = pair
    vit = dataclasses.replace(config.vit, width=into // config.patches_per_token)
    return dataclasses.replace(config, vit=vit, llama=dataclasses.replace(config.llama, width=out))


@pytest.mark.parametrize("have", projection.FITS)
@pytest.mark.parametrize("want", projection.FITS)
def test_every_pair_of_projection_and_model_is_told_apart(
    have: tuple[int, int], want: tuple[int, int], tiny_config: ModelConfig
) -> None:
    """A 7B projection on a 13B model, Llama-2's on a Vicuna...: every pair but the equal ones is refused by name."""
    held = {
        "llama_proj.weight": np.broadcast_to(np.float32(1), have[::-1]),
        "llama_proj.bias": np.ones(have[1], np.float32),
    }
    config = model_of(want, tiny_config)
    if have == want:
        projection.require_fit(ArraySource(held), config)
        return
    with pytest.raises(UserError) as error:
        projection.require_fit(ArraySource(held), config)
    assert f"projects {have[0]} -> {have[1]} and fits {projection.FITS[have]}" in str(error.value)
    assert f"needs {want[0]} -> {want[1]}: {projection.FITS[want]}" in str(error.value)


def test_trainer_checkpoint_is_read_with_a_reason_for_everything_else(
    tmp_path: Path, tree: Any, info: ProjectionInfo
) -> None:
    held = projection.to_released(tree) | {
        "Qformer.bert.embeddings.position_ids": np.arange(8)[None],
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    path = write_pth(tmp_path / "checkpoint_0.pth", held, under="model")
    read, _ = read_projection(path, info.config)
    np.testing.assert_array_equal(read["kernel"], tree["kernel"])
    held |= {"ln_vision.weight": np.ones(4, np.float32)}
    write_pth(tmp_path / "tuned.pth", held, under="model")
    with pytest.raises(ConversionError, match=r"ln_vision\.weight"):
        read_projection(tmp_path / "tuned.pth", info.config)


def test_other_files_given_as_a_projection_are_named(tmp_path: Path, info: ProjectionInfo) -> None:
    tower = {"patch_embed.proj.weight": np.ones(2), "blocks.0.attn.qkv.weight": np.ones(2)}
    save_file(tower, tmp_path / "p.safetensors")
    with pytest.raises(UserError, match=r"it is the EVA image tower .* Give it with --vit"):
        read_projection(tmp_path / "p.safetensors", info.config)


def test_projection_of_a_like_sized_model_is_refused(
    tmp_path: Path, tree: Any, info: ProjectionInfo
) -> None:
    write_projection(tmp_path / "p.safetensors", tree, info=info)
    other = dataclasses.replace(info.config, ln_vision_eps=1e-5)
    with pytest.raises(UserError, match="ln_vision_eps is 1e-06, the model has 1e-05"):
        read_projection(tmp_path / "p.safetensors", other)


@pytest.mark.parametrize("spelling", ["lora_A.weight", "lora_A.default.weight"])
def test_lora_weights_are_not_dropped_in_silence(
    tmp_path: Path, tree: Any, info: ProjectionInfo, spelling: str
) -> None:
    """As peft 0.2 writes them (the released files), and as it does since."""
    path = tmp_path / "v2.safetensors"
    save_file(projection.to_released(tree) | {f"x.q_proj.{spelling}": np.ones(4)}, path)
    with pytest.raises(UserError, match=r"MiniGPT-v2 .*1 LoRA tensors, such as x\.q_proj"):
        read_projection(path, info.config)


def test_edited_file_is_called_damaged(tmp_path: Path, tree: Any, info: ProjectionInfo) -> None:
    path = tmp_path / "p.safetensors"
    write_projection(path, tree, info=info)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {"llama_proj.bias": tree["bias"] + 1}, path, metadata=metadata)
    with pytest.raises(UserError, match="damaged or was edited"):
        read_projection(path, info.config)


def test_header_of_another_version_is_refused(
    tmp_path: Path, tree: Any, info: ProjectionInfo
) -> None:
    path = tmp_path / "p.safetensors"
    released = projection.to_released(tree)
    save_file(released, path, metadata={"format": "minigpt4_jax.projection/9"})
    with pytest.raises(UserError, match="has the format 'minigpt4_jax"):
        read_projection(path, info.config)
    save_file(released, path, metadata={"format": projection.FORMAT, "config": "{}"})
    with pytest.raises(UserError, match="The header of"):
        read_projection(path, info.config)


def test_file_without_a_projection_is_said(tmp_path: Path, info: ProjectionInfo) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "p.safetensors")
    with pytest.raises(UserError, match=r"holds no matrix 'llama_proj\.weight'"):
        read_projection(tmp_path / "p.safetensors", info.config)


def test_value_that_the_dtype_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, tree: Any, info: ProjectionInfo
) -> None:
    tree["kernel"][0, 0] = 1e6
    with pytest.raises(UserError, match="not finite as float16"):
        write_projection(tmp_path / "p.safetensors", tree, info=info, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_shape_is_checked_before_writing(tmp_path: Path, tree: Any, info: ProjectionInfo) -> None:
    tree["kernel"] = tree["kernel"][1:]
    rows = info.config.projection_in
    wrong = rf"is \[{rows - 1}, 32\] with a bias \[32\]; the model has \[{rows}, 32\]"
    with pytest.raises(UserError, match=wrong):
        write_projection(tmp_path / "p.safetensors", tree, info=info)
