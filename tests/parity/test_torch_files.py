"""PyTorch files against torch itself: what it saves is read bit for bit, and what is written here it loads."""

from __future__ import annotations

import collections
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert import projection
from convert.projection import read_projection, write_released
from convert.pth import PthSource, write_pth
from convert.pth_files import open_pth
from minigpt4_jax.config import UserError
from minigpt4_jax.presets import PRESETS
from tools.pth_bytes import plain, storage, tensor, text, write_zip64

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
]
FORMATS = [True, False]
"""`_use_new_zipfile_serialization`."""


def bits(x: torch.Tensor) -> bytes:
    """The elements in row-major order."""
    flat = x.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def require_same(source: PthSource, state: Any) -> None:
    assert source.names() == tuple(state)
    for label, x in state.items():
        found = source.get(label)
        assert found.shape == source.shape(label) == tuple(x.shape), label
        assert f"torch.{found.dtype}" == f"torch.{source.dtype(label)}" == str(x.dtype), label
        assert found.tobytes() == bits(x), label


def saved(folder: Path, value: Any, *, new: bool, suffix: str = ".pth") -> Path:
    path = folder / f"weights{suffix}"
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_that_torch_saves_is_read(
    tmp_path: Path, dtype: torch.dtype, new: bool
) -> None:
    x = (torch.randn(4, 6, 5) * 50).to(dtype)
    state = {
        "plain": x,
        "transposed": x.permute(2, 0, 1),
        "every other row, from the second": x[1::2],
        "columns": x[:, 1:4:2, ::3],
        "one element": x[2, 3, 4],
        "scalar": torch.ones((), dtype=dtype),
        "empty": x[:0],
        "empty of its own": torch.zeros(3, 0, 2, dtype=dtype),
        "channels last": x[None].contiguous(memory_format=torch.channels_last),
        "unfolded": x.flatten().as_strided((5, 3), (7, 2), 4),
    }
    require_same(PthSource(saved(tmp_path, state, new=new)), state)


@pytest.mark.parametrize("new", FORMATS)
def test_a_module_and_its_shared_and_tied_weights_are_read(tmp_path: Path, new: bool) -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)
    )
    module.register_buffer("mask", torch.ones(3, 3).tril().bool())
    state = module.state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert state._metadata  # type: ignore[attr-defined]  # the attribute that torch gives it
    state["tied"] = state["0.weight"]
    state["part"] = state["0.weight"][1:]
    require_same(PthSource(saved(tmp_path, state, new=new, suffix=".bin")), state)
    parameters = dict(module.named_parameters())
    assert all(isinstance(x, torch.nn.Parameter) for x in parameters.values())
    require_same(PthSource(saved(tmp_path, parameters, new=new)), parameters)


@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("half", [False, True])
def test_a_checkpoint_of_a_trainer_is_read_and_its_neighbours_are_named(
    tmp_path: Path, new: bool, half: bool
) -> None:
    layer = torch.nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, betas=(0.9, 0.999))
    layer(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    model = {f"llama_proj.{k}": v.half() if half else v for k, v in layer.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu").state_dict() or {"scale": 65536.0, "_growth_tracker": 0}
    whole = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "config": {"run": {"lr": 1e-4, "betas": [0.9, 0.999], "ckpt": None, "amp": True}, "n": 2**40},
        "scaler": scaler,
        "epoch": 3,
    }  # fmt: skip
    path = saved(tmp_path, whole, new=new)
    source = PthSource(path)
    require_same(source, model)
    assert source.metadata == {"left_alone": ["optimizer", "config", "scaler", "epoch"]}
    # What is left alone is understood all the same.
    inside = open_pth(path).value
    assert inside["config"] == whole["config"]
    assert (inside["epoch"], inside["scaler"]) == (3, scaler)
    assert inside["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 2),
        {"x": torch.randn(3).to_sparse()},
        {"x": torch.zeros(3, dtype=torch.complex64)},
        {"x": torch.zeros(3, dtype=torch.uint16)},
        {"x": torch.zeros(3, dtype=torch.float8_e4m3fn)},
        {"model": {}, "device": torch.device("cpu")},
        {"model": {}, "loss": np.float64(0.5)},
    ],
    ids=["module", "sparse", "complex", "uint16", "float8", "device", "NumPy scalar"],
)
def test_what_weights_do_not_need_is_refused_by_name(tmp_path: Path, value: Any, new: bool) -> None:
    path = saved(tmp_path, value, new=new)
    with pytest.raises(UserError, match=r"asks for the Python object (torch|numpy)\.[\w.]+, which"):
        PthSource(path)


@pytest.mark.parametrize("new", FORMATS)
def test_a_lazy_negation_is_refused(tmp_path: Path, new: bool) -> None:
    negated = torch.randn(3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with pytest.raises(UserError, match=r"ComplexFloatStorage|lazy negation"):
        PthSource(saved(tmp_path, {"x": negated}, new=new))


def test_a_scripted_module_is_called_a_program(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that TorchScript is deprecated
        script = torch.jit.script(torch.nn.Linear(2, 2))
        script.save(tmp_path / "weights.pt")
    with pytest.raises(UserError, match="is a TorchScript archive"):
        PthSource(tmp_path / "weights.pt")


def test_files_beyond_4_gb_mean_the_same_to_torch(tmp_path: Path) -> None:
    """The hole is zeros that take no room on the disk; torch maps the file too."""
    path, numel = tmp_path / "weights.pth", 2**30 + 3
    value = plain(
        text("hole") + tensor(storage("Float", "0", numel), (numel,), (1,))
        + text("behind") + tensor(storage("Float", "1", 3), (3,), (1,))
    )  # fmt: skip
    write_zip64(path, value, {"0": 4 * numel, "1": np.arange(3, dtype=np.float32).tobytes()})
    theirs = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    ours = PthSource(path)
    assert ours.shape("hole") == tuple(theirs["hole"].shape)
    assert ours.get("hole")[-1] == theirs["hole"][-1] == 0
    assert ours.get("behind").tobytes() == bits(theirs["behind"])


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_what_is_written_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, mmap: bool
) -> None:
    x = (torch.randn(4, 6) * 50).to(dtype)
    first, again = saved(tmp_path, {"x": x}, new=True), tmp_path / "again.pth"
    array = PthSource(first).get("x")
    entries = {
        "x": array,
        "transposed": array.T,
        "scalar": array[1, 2],
        "empty": array[:0],
        "ä b": array[::2, 1:],
    }
    write_pth(again, {"model": entries})
    loaded = torch.load(again, weights_only=True, mmap=mmap)
    expected = {"x": x, "transposed": x.T, "scalar": x[1, 2], "empty": x[:0], "ä b": x[::2, 1:]}
    assert list(loaded) == ["model"]
    assert list(loaded["model"]) == list(expected)
    for label, tensor_ in loaded["model"].items():
        assert (tensor_.dtype, tensor_.shape) == (x.dtype, expected[label].shape)
        assert bits(tensor_) == bits(expected[label])
    require_same(PthSource(again), expected)


def test_the_released_projection_goes_to_torch_and_back_bit_for_bit(tmp_path: Path) -> None:
    config = PRESETS["tiny"].model
    shape = (config.projection_in, config.llama.width)
    rng = np.random.default_rng(4)
    tree = {
        "kernel": rng.normal(size=shape).astype(np.float32),
        "bias": rng.normal(size=shape[1]).astype(np.float32),
    }
    write_released(tmp_path / "ours.pth", tree)
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert {key: list(entry) for key, entry in loaded.items()} == {
        "model": [projection.WEIGHT, projection.BIAS]
    }
    layer = torch.nn.Linear(*shape)
    layer.load_state_dict({k.removeprefix("llama_proj."): v for k, v in loaded["model"].items()})
    torch.save(
        {"model": {f"llama_proj.{k}": v for k, v in layer.state_dict().items()}},
        tmp_path / "theirs.pth",
    )
    read, _ = read_projection(tmp_path / "theirs.pth", config)
    for leaf in tree:
        assert np.asarray(read[leaf]).tobytes() == tree[leaf].tobytes()
