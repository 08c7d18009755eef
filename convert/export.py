"""The way back: the language model as a Hugging Face folder, bit for bit what was converted.

For: `export_llama`, from any source of tensors under the paths of the parameter tree (a model folder, a tree in memory)
to shards of safetensors with their index, `config.json`, `generation_config.json` and the tokenizer. One tensor at a
time is in memory. The table of `llama.py` is read backwards; there is no second one.
Not for: the projection (`projection.py`) and the other towers, which Hugging Face has no `Llama` folder for.

Differs from `save_pretrained` of transformers, which has the whole model in memory.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from convert.llama import hf_rules
from convert.rules import LAYER, Array, Rule, flatten, identity, transpose
from convert.safetensors_writer import (
    Entry,
    Written,
    require_room,
    tensor_bytes,
    write_safetensors,
)
from convert.sources import SafetensorsSource
from convert.tokenizer import CONFIG, FAST, MODEL, read_ids
from minigpt4_jax.checkpoint import compare_trees, listed
from minigpt4_jax.config import LlamaConfig, ModelConfig, UserError
from minigpt4_jax.models.minigpt4 import abstract_params

PART = "llama/"
"""The tree's part that is exported, as its paths begin."""
SHARD_BYTES = 5_000_000_000
"""Of one file, as large as Hugging Face makes them. A larger tensor has a file of its own."""
_DTYPES = ("float32", "float16", "bfloat16")
_ROOM = 1 << 26  # bytes for everything but tensors


class PathSource(Protocol):
    """Tensors under the paths of the parameter tree in the `DISK` layout: `llama/norm/scale`."""

    def names(self) -> tuple[str, ...]:
        """All of them; those that do not begin with `llama/` are other parts of the model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the values."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """Without reading the values."""

    def get(self, name: str) -> Array:
        """Reads one tensor."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export_llama` wrote."""

    folder: Path
    files: Mapping[str, Written]
    """The files of tensors, by name."""
    num_tensors: int
    dtype: str
    """As `config.json` says: that of most bytes. Every tensor keeps its own."""


@dataclass(frozen=True)
class _Tensor:
    path: str
    name: str
    """As Hugging Face calls it."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    turned: bool

    @property
    def size(self) -> int:
        return tensor_bytes(self.shape, self.dtype)


def export_llama(
    source: PathSource,
    out: Path,
    *,
    config: ModelConfig,
    tokenizer: Path,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int, str], None] | None = None,
) -> Exported:
    """Writes the language model of `config` into a new folder that `transformers` reads.

    Args:
        source: the parameters. Their dtypes are kept.
        out: must not exist, or be empty; it appears whole or not at all.
        config: of the whole model, which the shapes are compared with.
        tokenizer: folder with its `tokenizer.json` and `tokenizer_config.json`; a `tokenizer.model` there comes along.
        shard_bytes: most bytes of tensors in one file.
        on_tensor: called after every tensor with (done, total, its name in the new folder).

    Raises:
        UserError: parameters that are not the model's (all are listed), no tokenizer or one with more tokens than the
            model has rows, `out` in use, no room (checked first), no permission.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; expected a new folder. Choose another name.")
    tensors = _plan(source, config)
    count, ids = read_ids(tokenizer)
    if count > config.llama.vocab_size:
        raise UserError(
            f"The tokenizer in {tokenizer} has {count} tokens, the model {config.llama.vocab_size} rows. "
            "Take the tokenizer that came with this language model."
        )
    dtype = max(_DTYPES, key=lambda name: sum(t.size for t in tensors if t.dtype.name == name))
    with _new_folder(out) as partial:
        require_room(partial, sum(t.size for t in tensors) + _ROOM, what=str(out))
        files = _write_shards(partial, source, _shards(tensors, shard_bytes), on_tensor)
        _write_json(partial / "config.json", hf_json(config.llama, dtype=dtype) | ids)
        _write_json(partial / "generation_config.json", ids)
        for name in (FAST, CONFIG, MODEL):
            if name != MODEL or (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, partial / name)
    return Exported(folder=out, files=files, num_tensors=len(tensors), dtype=dtype)


def hf_json(config: LlamaConfig, *, dtype: str) -> dict[str, Any]:
    """`config.json` of a `LlamaForCausalLM` but for the ids; `llama.hf_config` reads the same sizes from it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _plan(source: PathSource, config: ModelConfig) -> list[_Tensor]:
    """Every tensor in the order of the layers, from names, shapes and dtypes alone."""
    expected = {PART + path: leaf for path, leaf in flatten(abstract_params(config)["llama"])}
    found = {
        name: jax.ShapeDtypeStruct(source.shape(name), source.dtype(name))
        for name in source.names()
        if name.startswith(PART)
    }
    problems = compare_trees(found, expected, check_dtypes=False)
    problems += [
        f"dtype of {name}: is {leaf.dtype}, expected one of {', '.join(_DTYPES)}"
        for name, leaf in found.items()
        if leaf.dtype.name not in _DTYPES
    ]
    if problems:
        raise UserError(
            f"The parameters are not those of the model: {listed(problems)}. Convert the language model again."
        )
    return [
        _Tensor(
            PART + path,
            name,
            found[PART + path].shape[:: -1 if turned else 1],
            found[PART + path].dtype,
            turned,
        )
        for path, name, turned in _names(config.llama)
    ]


def _names(config: LlamaConfig) -> Iterator[tuple[str, str, bool]]:
    """(path, Hugging Face's name, whether it is transposed) of every parameter: `hf_rules` backwards."""
    rules = hf_rules(config)
    odd = [r.target for r in rules if len(r.sources) != 1 or r.op not in (identity, transpose)]
    if odd:
        raise NotImplementedError(f"rows of hf_rules that have no way back here: {odd}")

    def row(rule: Rule, layer: str) -> tuple[str, str, bool]:
        path, name = (text.replace(LAYER, layer) for text in (rule.target, rule.sources[0]))
        return path, name, rule.op is transpose

    before, *after = (rule for rule in rules if LAYER not in rule.target)
    yield row(before, "")
    for i in range(config.num_layers):
        yield from (row(rule, str(i)) for rule in rules if LAYER in rule.target)
    yield from (row(rule, "") for rule in after)


def _shards(tensors: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    """Neighbours together, up to `shard_bytes` each."""
    shards: list[list[_Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    return shards


def _write_shards(
    folder: Path,
    source: PathSource,
    shards: list[list[_Tensor]],
    on_tensor: Callable[[int, int, str], None] | None,
) -> dict[str, Written]:
    total, done = sum(map(len, shards)), 0
    files: dict[str, Written] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def report(written: int, _: int, name: str, before: int = done) -> None:
            if on_tensor is not None:
                on_tensor(before + written, total, name)

        files[file] = write_safetensors(
            folder / file,
            [_entry(source, tensor) for tensor in shard],
            metadata={"format": "pt"},  # transformers 4 opens no file without it
            on_tensor=report,
        )
        done += len(shard)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        size = sum(tensor.size for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / SafetensorsSource.INDEX, index)
    return files


def _entry(source: PathSource, tensor: _Tensor) -> Entry:
    def read() -> Array:
        value = source.get(tensor.path)
        return value.T if tensor.turned else value

    return tensor.name, tensor.shape, tensor.dtype, read


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end. What a killed run left under that name is removed first."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}). Expected a place that you may write to, with room; choose another "
            "one, or free some space."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
