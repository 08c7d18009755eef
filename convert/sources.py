"""Files of tensors behind one small protocol: names, shapes and one array at a time.

For: GGUF, ONNX, safetensors (one file or a sharded folder), PyTorch files (`convert/pth.py`), plain dicts for tests.
Not for: what the tensors mean (the tables do that) and not for writing.

Differs from the PyTorch original, which reads whole pickles into memory: GGUF, safetensors and PyTorch files are
mapped, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from convert.pth import PthSource
from convert.shards import add_tensors, check_index, shard_files
from minigpt4_jax.config import UserError
from minigpt4_jax.weight_files import DTYPES as SAFETENSORS_DTYPES

Array = npt.NDArray[Any]


class TensorSource(Protocol):
    """A set of named tensors. `get` returns a float array in the source's dtype (quantised ones as float32)."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says about itself; empty where the format has none."""

    def describe(self) -> str:
        """The file, in the words of an error message."""

    def names(self) -> tuple[str, ...]:
        """All tensors, in the file's order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the values."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of what `get` returns, without reading the values."""

    def get(self, name: str) -> Array:
        """Reads one tensor."""

    def files(self) -> tuple[Path, ...]:
        """What was opened, for the record of where weights came from."""


class ArraySource:
    """A dict of arrays: tests, and formats that are small enough to be read at once."""

    def __init__(
        self,
        arrays: Mapping[str, Array],
        *,
        metadata: Mapping[str, Any] | None = None,
        files: tuple[Path, ...] = (),
    ) -> None:
        self._arrays = dict(arrays)
        self._files = files
        self.metadata: Mapping[str, Any] = metadata or {}

    def describe(self) -> str:
        return "The dict of arrays"

    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._arrays[name].dtype

    def get(self, name: str) -> Array:
        return self._arrays[name]

    def files(self) -> tuple[Path, ...]:
        return self._files


class GgufSource:
    """A GGUF file (llama.cpp), memory-mapped.

    Plain tensors (F32, F16, BF16, F64, integers) keep their dtype. Every block type that the `gguf` package knows
    becomes float32: a scale of 11 bits times a number of 4 or more does not fit float16, so only float32 gives back
    exactly what the file says.
    """

    ROWS = 4096
    """Dequantised at a time: the package needs several times their memory on the way."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._path = path
        self._gguf = gguf
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path} is not a whole GGUF file ({error}). Fetch it again."
            ) from error
        if self._reader.byte_order == "S":
            raise UserError(
                f"{path} is a big-endian GGUF file; expected the usual little-endian one."
            )
        self._tensors = {t.name: t for t in self._reader.tensors}

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        return {key: f.contents() for key, f in self._reader.fields.items()}

    def describe(self) -> str:
        return str(self._path)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        # GGUF counts axes from the fastest one.
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype[Any]:
        tensor = self._tensors[name]
        if tensor.tensor_type == self._gguf.GGMLQuantizationType.BF16:  # bytes, to the package
            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        plain: np.dtype[Any] = tensor.data.dtype
        return np.dtype(np.float32) if plain == np.uint8 else plain

    def get(self, name: str) -> Array:
        tensor, shape, dtype = self._tensors[name], self.shape(name), self.dtype(name)
        if tensor.data.dtype != np.uint8 or dtype == ml_dtypes.bfloat16:
            return np.asarray(tensor.data).view(dtype).reshape(shape)
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        values = np.empty((len(rows), shape[-1]), np.float32)
        for start in range(0, len(rows), self.ROWS):
            part = slice(start, start + self.ROWS)
            values[part] = self._gguf.dequantize(rows[part], tensor.tensor_type)
        return values.reshape(shape)

    def files(self) -> tuple[Path, ...]:
        return (self._path,)


class OnnxSource:
    """The initializers of an ONNX graph.

    Exporters rename constant-folded tensors to `onnx::MatMul_1966`: a number that the next export changes. Such a
    tensor is offered under the path of the node that uses it (`/backbone/encoder/layer.0/mlp/fc1/MatMul`), with the
    input's number behind a colon where one node uses several.
    """

    def __init__(self, path: Path) -> None:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        self._path = path
        try:
            model = onnx.load(str(path))
        except DecodeError as error:
            raise UserError(
                f"{path} is not a whole ONNX file ({error}). Fetch it again."
            ) from error
        self._onnx = onnx
        self.metadata: Mapping[str, Any] = {p.key: p.value for p in model.metadata_props}
        anonymous = {
            t.name: t for t in model.graph.initializer if re.fullmatch(r"onnx::.*", t.name)
        }
        self._tensors = {
            t.name: t for t in model.graph.initializer if t.name not in anonymous
        } | self._by_node(model.graph.node, anonymous)

    def _by_node(self, nodes: Any, anonymous: dict[str, Any]) -> dict[str, Any]:
        named: dict[str, Any] = {}
        waiting = dict(anonymous)
        for node in nodes:
            used = [k for k, name in enumerate(node.input) if name in anonymous]
            for k in used:
                tensor = waiting.pop(node.input[k], None)
                if tensor is None:
                    continue  # shared with an earlier node: it keeps that name
                name = node.name if len(used) == 1 else f"{node.name}:{k}"
                if not node.name or name in named:
                    raise UserError(
                        f"{self._path}: the tensor {tensor.name!r} has no stable name, and neither has the "
                        f"{node.op_type} node that uses it. Export the graph again with node names."
                    )
                named[name] = tensor
        return named | waiting

    def describe(self) -> str:
        return str(self._path)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].dims)

    def dtype(self, name: str) -> np.dtype[Any]:
        found: np.dtype[Any] = self._onnx.helper.tensor_dtype_to_np_dtype(
            self._tensors[name].data_type
        )
        return found

    def get(self, name: str) -> Array:
        array: Array = self._onnx.numpy_helper.to_array(self._tensors[name])
        return array

    def files(self) -> tuple[Path, ...]:
        return (self._path,)


class SafetensorsSource:
    """A safetensors file, or a folder of shards with its `model.safetensors.index.json`."""

    INDEX = "model.safetensors.index.json"

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        self._files: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        shards, indexed = shard_files(path, self.INDEX)
        self._shards = tuple(shards)
        for shard in shards:
            try:
                file: Any = safe_open(shard, framework="numpy")
            except SafetensorError as error:
                raise UserError(
                    f"{shard} is not a whole safetensors file ({error}). Fetch it again."
                ) from error
            metadata |= file.metadata() or {}
            add_tensors(self._files, dict.fromkeys(file.keys(), file), shard)
        self.metadata: Mapping[str, Any] = metadata
        check_index(path, indexed, set(self._files))

    def describe(self) -> str:
        return str(self._path)

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype[Any]:
        stored = self._files[name].get_slice(name).get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{self._path}: {name} is stored as {stored}; expected one of {', '.join(SAFETENSORS_DTYPES)}."
            )
        return SAFETENSORS_DTYPES[stored]

    def get(self, name: str) -> Array:
        array: Array = self._files[name].get_tensor(name)
        return array

    def files(self) -> tuple[Path, ...]:
        return self._shards


def open_source(path: Path) -> GgufSource | OnnxSource | SafetensorsSource | PthSource:
    """Opens a file by its ending, or a Hugging Face folder by what lies in it.

    Raises:
        UserError: nothing there, or no format that is known here.
    """
    if not path.exists():
        raise UserError(f"There is no {path}; expected a weight file or a Hugging Face folder.")
    if path.is_dir():
        if (path / SafetensorsSource.INDEX).exists():
            return SafetensorsSource(path)
        if (path / "model.safetensors").exists():
            return SafetensorsSource(path / "model.safetensors")
        if (path / PthSource.INDEX).exists():
            return PthSource(path)
        if (path / "pytorch_model.bin").exists():
            return PthSource(path / "pytorch_model.bin")
        raise UserError(
            f"The folder {path} holds no weights: expected model.safetensors, pytorch_model.bin, or shards with "
            f"{SafetensorsSource.INDEX} or {PthSource.INDEX}."
        )
    readers: dict[str, type[GgufSource | OnnxSource | SafetensorsSource | PthSource]] = {
        ".gguf": GgufSource,
        ".onnx": OnnxSource,
        ".safetensors": SafetensorsSource,
        ".pth": PthSource,
        ".pt": PthSource,
        ".bin": PthSource,
    }
    if path.suffix not in readers:
        raise UserError(
            f"{path} ends in {path.suffix!r}; expected one of {', '.join(readers)} or a folder."
        )
    try:
        return readers[path.suffix](path)
    except (UserError, OSError, ImportError):
        raise
    except (
        Exception
    ) as error:  # among damaged bytes the readers' libraries raise whatever they meet
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(
            f"{path} is damaged or no {path.suffix} file ({reason}). Fetch it again."
        ) from error
