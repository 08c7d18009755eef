"""Meta's own files, `consolidated.NN.pth` with `params.json`: merged on the fly into one Hugging Face state dict.

For: LLaMA 1 and Llama 2 as Meta published them, one to eight shards. The parts of a tensor are joined when it is asked
for, the rope rows of q and k are put into half-split order, and the names are Hugging Face's: so the one table of
`llama.py` reads both forms, and a Vicuna delta (which has Hugging Face's names) can be added to Meta's files as they
are, without the detour over a converted copy.
Not for: Llama 3, whose embeddings are split by rows and whose rope may be scaled (both are refused).

Differs from `transformers`' conversion script, which reads all shards into memory, takes the number of shards from a
table of model sizes and drops what it does not know. Which axis a tensor is split along are facts of Meta's parallel
layers: outputs of wq, wk, wv, w1, w3 and output by rows, inputs of wo and w2 and the embedding by columns, norms whole
in every shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.rules import Array, Excuse, interleaved_to_half_split
from convert.sources import TensorSource, open_source
from minigpt4_jax.config import LlamaConfig, UserError

Split = Literal["rows", "columns", "copies"]


@dataclass(frozen=True)
class _Tensor:
    """One row of the table: where a tensor of Meta's goes, and how its shards make it up."""

    name: str
    """Hugging Face's; `{i}` is the layer."""
    split: Split
    rope: Literal["n_heads", "n_kv_heads"] | None = None
    """Of q and k: the number of heads, whose rows are in rotary pairs in Meta's files."""


_LAYER = "model.layers.{i}"
TABLE: Mapping[str, _Tensor] = {
    "tok_embeddings.weight": _Tensor("model.embed_tokens.weight", "columns"),
    "layers.{i}.attention_norm.weight": _Tensor(f"{_LAYER}.input_layernorm.weight", "copies"),
    "layers.{i}.attention.wq.weight": _Tensor(
        f"{_LAYER}.self_attn.q_proj.weight", "rows", rope="n_heads"
    ),
    "layers.{i}.attention.wk.weight": _Tensor(
        f"{_LAYER}.self_attn.k_proj.weight", "rows", rope="n_kv_heads"
    ),
    "layers.{i}.attention.wv.weight": _Tensor(f"{_LAYER}.self_attn.v_proj.weight", "rows"),
    "layers.{i}.attention.wo.weight": _Tensor(f"{_LAYER}.self_attn.o_proj.weight", "columns"),
    "layers.{i}.ffn_norm.weight": _Tensor(f"{_LAYER}.post_attention_layernorm.weight", "copies"),
    "layers.{i}.feed_forward.w1.weight": _Tensor(f"{_LAYER}.mlp.gate_proj.weight", "rows"),
    "layers.{i}.feed_forward.w3.weight": _Tensor(f"{_LAYER}.mlp.up_proj.weight", "rows"),
    "layers.{i}.feed_forward.w2.weight": _Tensor(f"{_LAYER}.mlp.down_proj.weight", "columns"),
    "norm.weight": _Tensor("model.norm.weight", "copies"),
    "output.weight": _Tensor("lm_head.weight", "rows"),
}
"""By Meta's name."""

META_EXCUSES: tuple[Excuse, ...] = tuple(
    Excuse(name, "a buffer of Meta's files; the rotation is computed from the rope base")
    for name in ("rope.freqs", "layers.{i}.attention.inner_attention.rope.freqs")
)

_QUERY = "layers.0.attention.wq.weight"
_GATE = "model.layers.0.mlp.gate_proj.weight"
_EMBEDDING = "model.embed_tokens.weight"


def is_meta_folder(folder: Path) -> bool:
    """Whether Meta's shards lie there."""
    return any(folder.glob("consolidated.*.pth"))


class MetaSource:
    """Meta's shards as one source. `metadata` is `params.json`; names that the table does not know keep their own.

    Raises:
        UserError: a shard or params.json is missing, or the shards are not parts of one model.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.metadata: Mapping[str, Any] = _read_params(folder)
        paths = _shard_files(folder)
        self._shards: dict[str, TensorSource] = {path.name: open_source(path) for path in paths}
        self._files = (*paths, folder / "params.json")
        self._first = next(iter(self._shards.values()))
        self._require_alike()
        self._require_all()
        self._tensors = {row.name: (theirs, row) for theirs, row in self._rows()}

    def describe(self) -> str:
        return f"{self._folder} (Meta's shards, under Hugging Face's names)"

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        theirs, row = self._tensors[name]
        shape = list(self._first.shape(theirs))
        if row.split != "copies":
            shape[_axis(row.split)] *= len(self._shards)
        return tuple(shape)

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._first.dtype(self._tensors[name][0])

    def files(self) -> tuple[Path, ...]:
        return self._files

    def get(self, name: str) -> Array:
        theirs, row = self._tensors[name]
        parts = {shard: source.get(theirs) for shard, source in self._shards.items()}
        if row.split == "copies":
            value = self._same(theirs, parts)
        elif len(parts) == 1:
            (value,) = parts.values()
        else:
            value = np.concatenate(list(parts.values()), axis=_axis(row.split))
        if row.rope is None:
            return value
        return interleaved_to_half_split(num_heads(self.metadata, row.rope)).apply(value)

    def _same(self, theirs: str, parts: Mapping[str, Array]) -> Array:
        """What every shard has whole."""
        (first, value), *others = parts.items()
        for shard, other in others:
            if not np.array_equal(value, other):
                raise UserError(
                    f"{self._folder}: {theirs} differs between {first} and {shard}; every shard of one model holds the "
                    "same copy. The folder mixes files of two models; fetch it again."
                )
        return value

    def _rows(self) -> list[tuple[str, _Tensor]]:
        """(Meta's name, row of the table) of every tensor there is."""
        rows = []
        for theirs in self._first.names():
            layer = re.fullmatch(r"layers\.(\d+)\..*", theirs)
            number = layer.group(1) if layer else ""
            row = TABLE.get(theirs.replace(f"layers.{number}.", "layers.{i}.", 1))
            if row is None:
                row = _Tensor(theirs, "copies")  # for an excuse, or for the error that lists it
            rows.append((theirs, _Tensor(row.name.replace("{i}", number), row.split, row.rope)))
        return rows

    def _require_alike(self) -> None:
        """All shards have the same names, shapes and dtypes."""
        (first, source), *others = self._shards.items()
        for shard, other in others:
            names, theirs = set(source.names()), set(other.names())
            if names != theirs:
                raise UserError(
                    f"{self._folder}: {first} and {shard} are not shards of one model. Only in {first}: "
                    f"{_some(names - theirs)}; only in {shard}: {_some(theirs - names)}. Fetch the folder again."
                )
            unequal = [
                f"{name} {list(source.shape(name))} and {list(other.shape(name))}"
                for name in source.names()
                if (source.shape(name), source.dtype(name))
                != (other.shape(name), other.dtype(name))
            ]
            if unequal:
                raise UserError(
                    f"{self._folder}: tensors of {first} and {shard} have unequal shapes or dtypes: "
                    f"{_some(unequal)}. Expected equal parts of one model; fetch the folder again."
                )

    def _require_all(self) -> None:
        """As many shards as the width of the model asks for, and the embedding split as LLaMA 1 and 2 do."""
        width, have = _need(self.metadata, "dim", self._folder), len(self._shards)
        for name in (_QUERY, "tok_embeddings.weight"):
            if name not in self._first.names():
                raise UserError(
                    f"{self._folder} has no {name}; expected Meta's names. Its first tensors: "
                    f"{_some(self._first.names())}."
                )
        rows = self._first.shape(_QUERY)[0]
        want = width // rows if rows and width % rows == 0 else 0
        if want > have:
            missing = [f"consolidated.{i:02}.pth" for i in range(have, want)]
            raise UserError(
                f"{self._folder} holds {have} of {want} shards (each has {rows} of {width} rows of wq); not there: "
                f"{', '.join(missing)}. Fetch them too."
            )
        if want != have:
            raise UserError(
                f"{self._folder} holds {have} shard(s) of which each has {rows} rows of wq; params.json says {width} "
                "in all. They do not belong together; fetch the folder again."
            )
        columns = self._first.shape("tok_embeddings.weight")[1] * have
        if columns != width:
            raise UserError(
                f"{self._folder}: the shards of tok_embeddings.weight join to {columns} columns, params.json says "
                f"{width}. Expected the embedding of LLaMA 1 or Llama 2, which is split by columns; Llama 3 is not "
                "built here."
            )


def meta_config(source: MetaSource, *, max_positions: int | None = None) -> LlamaConfig:
    """Sizes from `params.json` and, where it is silent, from the tensors.

    Args:
        max_positions: of the model, where the caller knows it (a preset does): Meta's files do not say it.

    Raises:
        UserError: params.json contradicts the tensors, or lacks a size.
    """
    params, where = source.metadata, source.describe()
    if params.get("use_scaled_rope"):
        raise UserError(f"{where} scales its rope; expected LLaMA 1 or Llama 2, which do not.")

    def need(key: str) -> Any:
        return _need(params, key, where)

    positions = params.get("max_seq_len") or max_positions
    if positions is None:
        raise UserError(
            f"{where}: params.json does not say how many positions the model was trained for. Add "
            '"max_seq_len": 2048 (LLaMA 1) or "max_seq_len": 4096 (Llama 2) to it, or name the model (a preset).'
        )
    width, heads = need("dim"), need("n_heads")
    rows, mlp_width = source.shape(_EMBEDDING)[0], source.shape(_GATE)[0]
    vocab_size = params.get("vocab_size", -1)
    if vocab_size not in (-1, rows):
        raise UserError(
            f"{where}: params.json says vocab_size {vocab_size}, the embedding has {rows} rows. They do not belong "
            "together; fetch the folder again."
        )
    formula = _mlp_width(width, need("multiple_of"), params.get("ffn_dim_multiplier"))
    if formula != mlp_width:
        raise UserError(
            f"{where}: w1 has {mlp_width} rows, params.json (dim, multiple_of, ffn_dim_multiplier) gives {formula}. "
            "They do not belong together; fetch the folder again."
        )
    return LlamaConfig(
        vocab_size=rows,
        width=width,
        mlp_width=mlp_width,
        num_layers=need("n_layers"),
        num_heads=heads,
        num_kv_heads=num_heads(params, "n_kv_heads"),
        head_dim=width // heads,
        rope_base=float(params.get("rope_theta", 10000.0)),  # LLaMA 1 and 2 leave it out: 10000
        norm_eps=need("norm_eps"),
        tie_embeddings=False,
        max_positions=positions,
    )


def num_heads(params: Mapping[str, Any], key: Literal["n_heads", "n_kv_heads"]) -> int:
    """Heads of q, or of k and v: params.json names the latter only where heads are grouped."""
    heads: int = params.get(key) or _need(params, "n_heads", "params.json")
    return heads


def _mlp_width(width: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's formula: two thirds of four widths, perhaps times a factor, rounded up to a multiple."""
    hidden = int(2 * 4 * width / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _read_params(folder: Path) -> dict[str, Any]:
    path = folder / "params.json"
    try:
        params = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected Meta's params.json beside consolidated.00.pth. It "
            "comes with the download."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}). Fetch it again.") from error
    if not isinstance(params, dict):
        raise UserError(f"{path} holds no table of sizes; expected Meta's params.json.")
    return params


def _shard_files(folder: Path) -> list[Path]:
    """The shards in order; a gap in their numbers is named."""
    found = {
        int(match.group(1)): path
        for path in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    if not found:
        raise UserError(f"There is no consolidated.00.pth in {folder}; expected Meta's shards.")
    missing = [f"consolidated.{i:02}.pth" for i in range(max(found)) if i not in found]
    if missing:
        raise UserError(
            f"{folder} holds {', '.join(p.name for p in found.values())} but not {', '.join(missing)}. Fetch them too."
        )
    return [found[i] for i in sorted(found)]


def _axis(split: Split) -> int:
    return {"rows": 0, "columns": 1}[split]


def _need(params: Mapping[str, Any], key: str, where: object) -> Any:
    if key not in params:
        raise UserError(f"{where}: params.json does not say {key!r}, which the model needs.")
    return params[key]


def _some(names: Any) -> str:
    """The first few of a list, for a message."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "-"
