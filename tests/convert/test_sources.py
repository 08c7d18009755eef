"""Every format is read by name, one tensor at a time, and a broken file is called broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from convert.sources import GgufSource, OnnxSource, SafetensorsSource, open_source
from minigpt4_jax.config import UserError

Arrays = dict[str, np.ndarray]


def test_gguf_gives_names_shapes_values_and_metadata(
    tmp_path: Path, gguf_arrays: Arrays, write_gguf: Callable[..., Path]
) -> None:
    source = open_source(write_gguf(tmp_path / "m.gguf", gguf_arrays))
    assert isinstance(source, GgufSource)
    assert set(source.names()) == set(gguf_arrays)
    for name, x in gguf_arrays.items():
        assert source.shape(name) == x.shape
        np.testing.assert_array_equal(source.get(name), x)
    assert source.metadata["llama.block_count"] == 2
    assert source.metadata["tokenizer.ggml.tokens"][1] == "<|im_start|>"


def test_gguf_keeps_the_dtype_of_plain_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = {"a": np.float32, "b": np.float16, "c": ml_dtypes.bfloat16, "d": np.float64}
    arrays = {name: rng.normal(size=(6, 32)).astype(kind) for name, kind in kinds.items()}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, x in arrays.items():
        if x.dtype == ml_dtypes.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, x.view(np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    finish(writer)
    source = GgufSource(tmp_path / "m.gguf")
    for name, x in arrays.items():
        value = source.get(name)
        assert source.dtype(name) == value.dtype == x.dtype
        np.testing.assert_array_equal(value, x)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q2_K"])
def test_gguf_dequantises_in_parts_as_at_once(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of small bytes, whose half-precision scales are finite; 11 rows, read 4 at a time."""
    quantised = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantised]
    data = np.random.default_rng(0).integers(0, 64, (11, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", data, raw_dtype=quantised)
    finish(writer)
    source = GgufSource(tmp_path / "m.gguf")
    monkeypatch.setattr(source, "ROWS", 4)
    value = source.get("a")
    assert source.shape("a") == value.shape == (11, 512)
    assert source.dtype("a") == value.dtype == np.float32
    assert value.std() > 0
    np.testing.assert_array_equal(value, gguf.dequantize(data, quantised))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.ones(4, np.float32))
    finish(writer)
    with pytest.raises(UserError, match="is a big-endian GGUF file"):
        open_source(tmp_path / "m.gguf")


def test_onnx_names_anonymous_tensors_by_the_node_that_uses_them(
    tmp_path: Path, dino_arrays: Arrays, write_onnx: Callable[..., Path]
) -> None:
    source = open_source(write_onnx(tmp_path / "m.onnx", dino_arrays))
    assert isinstance(source, OnnxSource)
    assert set(source.names()) == set(dino_arrays)
    for name, x in dino_arrays.items():
        assert source.shape(name) == x.shape
        np.testing.assert_array_equal(source.get(name), x)


def onnx_file(path: Path, nodes: list[onnx.NodeProto]) -> Path:
    tensors = [numpy_helper.from_array(np.full(2, i, np.float32), f"onnx::Add_{i}") for i in (1, 2)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), path)
    return path


def test_onnx_numbers_the_anonymous_inputs_of_one_node(tmp_path: Path) -> None:
    node = helper.make_node("Sum", ["x", "onnx::Add_1", "onnx::Add_2"], ["y"], name="/sum")
    source = OnnxSource(onnx_file(tmp_path / "m.onnx", [node]))
    assert {name: source.get(name)[0] for name in source.names()} == {"/sum:1": 1, "/sum:2": 2}


def test_onnx_tensor_shared_by_two_nodes_appears_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "onnx::Add_1"], ["y"], name="/first"),
        helper.make_node("Add", ["y", "onnx::Add_1"], ["z"], name="/second"),
        helper.make_node("Add", ["z", "onnx::Add_2"], ["w"], name="/third"),
    ]
    assert OnnxSource(onnx_file(tmp_path / "m.onnx", nodes)).names() == ("/first", "/third")


def test_onnx_tensor_without_any_stable_name_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "onnx::Add_1"], ["y"])
    with pytest.raises(UserError, match="'onnx::Add_1' has no stable name"):
        OnnxSource(onnx_file(tmp_path / "m.onnx", [node]))


def test_onnx_tensor_that_no_node_uses_is_not_hidden(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "onnx::Add_1"], ["y"], name="/a")
    assert OnnxSource(onnx_file(tmp_path / "m.onnx", [node])).names() == ("/a", "onnx::Add_2")


def shards(folder: Path) -> Path:
    save_file({"a": np.ones((2, 3), np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.ones(4, ml_dtypes.bfloat16)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / SafetensorsSource.INDEX).write_text(json.dumps(index))
    return folder


def test_safetensors_shards_read_like_one_file(tmp_path: Path) -> None:
    source = open_source(shards(tmp_path))
    assert set(source.names()) == {"a", "b"}
    assert source.shape("a") == (2, 3)
    assert source.get("b").dtype == ml_dtypes.bfloat16


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (shards(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"not there: model-2\.safetensors"):
        open_source(tmp_path)


def test_shards_that_disagree_with_their_index_are_refused(tmp_path: Path) -> None:
    save_file({"c": np.ones(4, np.float32)}, shards(tmp_path) / "model-2.safetensors")
    with pytest.raises(UserError, match=r"Only in the index: \['b'\]; only in the shards: \['c'\]"):
        open_source(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    both = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}
    save_file(both, shards(tmp_path) / "model-2.safetensors")
    with pytest.raises(UserError, match="an earlier shard has too: a"):
        open_source(tmp_path)


def test_dtypes_are_told_without_reading_and_are_those_that_get_returns(
    tmp_path: Path, gguf_arrays: Arrays, dino_arrays: Arrays,
    write_gguf: Callable[..., Path], write_onnx: Callable[..., Path],
) -> None:  # fmt: skip
    kinds = (np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_, ml_dtypes.bfloat16)
    mixed = {np.dtype(kind).name: np.ones((2, 3), kind) for kind in kinds}
    save_file(mixed, tmp_path / "m.safetensors")
    files = (
        tmp_path / "m.safetensors",
        write_gguf(tmp_path / "m.gguf", gguf_arrays),
        write_onnx(tmp_path / "m.onnx", dino_arrays),
    )
    for path in files:
        source = open_source(path)
        assert source.files() == (path,)
        for name in source.names():
            assert source.dtype(name) == source.get(name).dtype, name
    assert {str(open_source(files[0]).dtype(name)) for name in mixed} == set(mixed)


@pytest.mark.parametrize("ending", [".gguf", ".onnx", ".safetensors"])
def test_file_that_is_cut_short_is_called_broken(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"m{ending}"
    path.write_bytes(b"\x08\xff half a file")
    with pytest.raises(UserError, match="is not a whole"):
        open_source(path)


def test_unknown_ending_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "m.h5").touch()
    with pytest.raises(UserError, match=r"ends in '\.h5'; expected one of \.gguf"):
        open_source(tmp_path / "m.h5")


def test_missing_file_and_empty_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no"):
        open_source(tmp_path / "nothing.gguf")
    with pytest.raises(UserError, match="holds no weights"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["gguf", "onnx", "safetensors", "pth"])
@pytest.mark.parametrize(
    "content", [b"", b"GGUF\3\0\0\0", bytes(64), b"\xff" * 64, b"\x80\x04]\x94.", b"PK\3\4" + bytes(60)],
    ids=["empty", "gguf start", "zeros", "ones", "a pickled list", "zip start"],
)  # fmt: skip
def test_damaged_files_of_every_kind_are_refused_by_name(
    kind: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"weights.{kind}"
    path.write_bytes(content)
    if (kind, content) == ("onnx", b""):  # a graph without anything: every tensor is missing then
        assert open_source(path).names() == ()
        return
    with pytest.raises(UserError, match=path.name):
        open_source(path)
