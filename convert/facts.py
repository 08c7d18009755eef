"""What a file or folder is, for `python -m convert inspect`: kind, sizes, and where it goes.

For: anything that a person may hold in the hand: weights of every kind that is read here, tokenizers, folders that
this project wrote. Names and shapes are read, and a few norms (a delta has the names of a model); never all values.
Not for: whether a file is complete and fits the model: that is the tables' work, when it is converted.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convert.detect import (
    BUFFERS,
    DELTA_BELOW,
    LORA,
    NO_OPTION,
    OPTIONS,
    V0_VOCABULARY,
    Kind,
    dtypes_of,
    kind_of,
    norm_scale,
)
from convert.llama_files import open_unchecked
from convert.meta import MetaSource, is_meta_folder
from convert.projection import FITS, WEIGHT
from convert.sources import TensorSource, open_source
from minigpt4_jax.config import UserError
from minigpt4_jax.model_folder import FORMAT, MANIFEST, ModelFolder
from minigpt4_jax.presets import PRESETS, Preset

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What is known of a file or folder without reading its values."""

    path: Path
    kind: Kind
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    """By name: `width`, `layers`, `tokens`..."""
    num_tensors: int = 0
    num_parameters: int = 0
    """Buffers not counted."""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """dtype -> number of tensors, as they are read (quantised ones as float32)."""
    fits: tuple[str, ...] = ()
    """Presets whose part has these sizes."""
    notes: tuple[str, ...] = ()
    """What a person should know or mend."""

    @property
    def options(self) -> tuple[str, ...]:
        """Of the converter, which take it."""
        return OPTIONS[self.kind]


def describe_file(path: Path) -> FileFacts:
    """Says what lies at `path`.

    Raises:
        UserError: nothing is there, or it is damaged. A file that is merely unknown is described as such.
    """
    if not path.exists():
        raise UserError(f"There is no {path}; expected a file or folder.")
    if _is_model_folder(path):
        return _of_model_folder(path)
    if _is_tokenizer(path):
        return FileFacts(path=path, kind=Kind.TOKENIZER)
    if path.is_dir():
        return _of_folder(path)
    return _of_source(path, open_source(path))


def print_facts(facts: FileFacts, console: Console) -> None:
    """A table of two columns."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in fact_rows(facts):
        table.add_row(label, text.replace("[", r"\["))
    console.print(table)


def fact_rows(facts: FileFacts) -> Iterator[tuple[str, str]]:
    """(label, text) of everything that is known."""
    yield "file", str(facts.path)
    yield "is", str(facts.kind)
    if facts.sizes:
        yield "sizes", ", ".join(f"{label} {size}" for label, size in facts.sizes.items())
    if facts.num_tensors:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts.dtypes.items())
        yield "tensors", f"{facts.num_tensors} ({dtypes})"
        yield "parameters", f"{facts.num_parameters:,}"
    if facts.options:
        yield "give it with", " or ".join(facts.options)
        yield "fits", ", ".join(facts.fits) or "no preset"
    elif facts.kind in NO_OPTION:
        yield "give it with", f"no option. {NO_OPTION[facts.kind]}"
    for note in facts.notes:
        yield "note", note


def _is_model_folder(path: Path) -> bool:
    try:
        return bool(json.loads((path / MANIFEST).read_text()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def _of_model_folder(path: Path) -> FileFacts:
    folder = ModelFolder(path)
    names, model = folder.names(), folder.preset.model
    parts = dict.fromkeys(name.split("/")[0] for name in names)
    return FileFacts(
        path=path,
        kind=Kind.MODEL_FOLDER,
        sizes={
            "parts": ", ".join(parts),
            "image tokens": model.num_image_tokens,
            "language model": f"{model.llama.width} wide, {model.llama.num_layers} layers",
        },
        num_tensors=len(names),
        num_parameters=sum(math.prod(folder.shape(name)) for name in names),
        dtypes=Counter(str(folder.dtype(name)) for name in names),
        notes=tuple(
            f"{part} from {', '.join(file['name'] for file in source['files'])}"
            for part, source in folder.sources.items()
            if source["files"]
        ),
    )


def _is_tokenizer(path: Path) -> bool:
    """A tokenizer file, or a folder that holds one and no weights."""
    if path.is_file():
        return path.name in TOKENIZER_FILES or path.suffix == ".model"
    held = [file.name for file in path.iterdir()]
    weights = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx")
    return any(n in held for n in TOKENIZER_FILES) and not any(n.endswith(weights) for n in held)


def _of_folder(path: Path) -> FileFacts:
    """A folder with Meta's files, or with a config.json of Hugging Face (of any architecture)."""
    source: TensorSource = MetaSource(path) if is_meta_folder(path) else open_source(path)
    try:
        notes = open_unchecked(path).notes
    except (
        UserError
    ) as error:  # what stops a conversion is worth knowing, and no reason to say nothing else
        notes = (str(error),)
    return _of_source(path, source, notes=notes)


def _of_source(path: Path, source: TensorSource, *, notes: tuple[str, ...] = ()) -> FileFacts:
    kind, names = kind_of(source), source.names()
    if kind is Kind.LLAMA:
        kind, more = _model_or_delta(path, source)
        notes += more
    if kind is Kind.UNKNOWN:
        notes = (*notes, f"its first tensors: {', '.join(names[:4]) or 'none'}")
    if source.metadata.get("left_alone"):
        notes = (
            *notes,
            f"beside the weights, not read: {', '.join(source.metadata['left_alone'])}",
        )
    sizes = _SIZES[kind](source) if kind in _SIZES else {}
    return FileFacts(
        path=path,
        kind=kind,
        sizes=sizes,
        num_tensors=len(names),
        num_parameters=sum(math.prod(source.shape(n)) for n in names if not BUFFERS.search(n)),
        dtypes=dtypes_of(source),
        fits=tuple(sorted(name for name, preset in PRESETS.items() if _fits(kind, sizes, preset))),
        notes=notes + _pairing(kind, sizes),
    )


def _model_or_delta(path: Path, source: TensorSource) -> tuple[Kind, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if path.is_file() and path.suffix != ".gguf":
        notes = ("one file of a language model; the converter takes its folder",)
    try:
        scale = norm_scale(source)
    except UserError:  # one shard may hold none
        return Kind.LLAMA, (*notes, "no norms in it, so that it may be of a delta as well")
    kind = Kind.DELTA if scale < DELTA_BELOW else Kind.LLAMA
    return kind, (*notes, f"its norms scale by {scale:.3g} (a model's by about 1, a delta's by 0)")


# --- sizes, from names and shapes alone -------------------------------------------------------------------------------


def _llama_sizes(source: TensorSource) -> dict[str, int | str]:
    names = source.names()
    hugging_face = ("model.embed_tokens.weight", "mlp.gate_proj.weight", r"model\.layers\.(\d+)\.")
    gguf = ("token_embd.weight", "ffn_gate.weight", r"blk\.(\d+)\.")
    meta_shard = ("tok_embeddings.weight", "feed_forward.w1.weight", r"layers\.(\d+)\.")
    for embedding, gate, layer in (hugging_face, gguf, meta_shard):
        if embedding in names:
            tokens, width = source.shape(embedding)
            gates = [source.shape(name)[0] for name in names if name.endswith(gate)]
            sizes: dict[str, int | str] = {"tokens": tokens, "width": width}
            return sizes | {"layers": _count(names, layer), "mlp": max(gates, default=0)}
    return {}


def _eva_sizes(source: TensorSource) -> dict[str, int | str]:
    width, _, patch, _ = source.shape("patch_embed.proj.weight")
    sizes: dict[str, int | str] = {"width": width, "patch": patch}
    sizes["blocks"] = _count(source.names(), r"blocks\.(\d+)\.")
    if "pos_embed" in source.names():
        grid = math.isqrt(source.shape("pos_embed")[1] - 1)
        sizes["grid"] = f"{grid} x {grid} (resized to the picture when converted)"
    return sizes


def _qformer_sizes(source: TensorSource) -> dict[str, int | str]:
    _, queries, width = source.shape("query_tokens")
    layers = _count(source.names(), r"(?:Qformer\.bert|qformer)\.encoder\.layer\.(\d+)\.")
    return {"queries": queries, "width": width, "layers": layers}


def _projection_sizes(source: TensorSource) -> dict[str, int | str]:
    if WEIGHT not in source.names() or len(source.shape(WEIGHT)) != 2:
        return {}
    out, into = source.shape(WEIGHT)
    return {"in": into, "out": out}


def _v2_sizes(source: TensorSource) -> dict[str, int | str]:
    lora = [name for name in source.names() if LORA.search(name)]
    later = sum(".default." in name for name in lora)
    spelling = "peft 0.2" if not later else "later peft" if later == len(lora) else "mixed"
    return _projection_sizes(source) | {"LoRA tensors": len(lora), "LoRA names": spelling}


_SIZES: Mapping[Kind, Callable[[TensorSource], dict[str, int | str]]] = {
    Kind.LLAMA: _llama_sizes,
    Kind.DELTA: _llama_sizes,
    Kind.EVA_VIT: _eva_sizes,
    Kind.QFORMER: _qformer_sizes,
    Kind.BLIP2: _qformer_sizes,
    Kind.PROJECTION: _projection_sizes,
    Kind.TRAINER: _projection_sizes,
    Kind.OUR_PROJECTION: _projection_sizes,
    Kind.MINIGPT_V2: _v2_sizes,
}


def _count(names: Iterable[str], pattern: str) -> int:
    """How many layers have a tensor."""
    return len({match.group(1) for name in names if (match := re.match(pattern, name))})


# --- pairs ------------------------------------------------------------------------------------------------------------


def _fits(kind: Kind, sizes: Mapping[str, int | str], preset: Preset) -> bool:
    """Whether the part has the preset's sizes; what a file cannot show (heads, eps) is left to the conversion."""
    model, llama = preset.model, preset.model.llama
    if kind in (Kind.PROJECTION, Kind.TRAINER, Kind.OUR_PROJECTION):
        return sizes.get("in") == model.projection_in and sizes.get("out") == llama.width
    if kind in (Kind.LLAMA, Kind.DELTA):
        ours = (llama.vocab_size, llama.width, llama.num_layers, llama.mlp_width)
        return tuple(sizes.get(key) for key in ("tokens", "width", "layers", "mlp")) == ours
    if kind is Kind.EVA_VIT:
        used = model.vit.num_layers
        same = (sizes["width"], sizes["patch"]) == (model.vit.width, model.vit.patch_size)
        return same and sizes["blocks"] in (used, used + 1)  # the published file has one more
    qformer = model.qformer
    if kind in (Kind.QFORMER, Kind.BLIP2) and qformer is not None:
        wanted = (qformer.num_queries, qformer.width, qformer.num_layers)
        return tuple(sizes.get(key) for key in ("queries", "width", "layers")) == wanted
    return False


def _pairing(kind: Kind, sizes: Mapping[str, int | str]) -> tuple[str, ...]:
    """Which other file belongs to it, where the sizes tell."""
    if kind in (Kind.LLAMA, Kind.DELTA):
        known = {
            V0_VOCABULARY: "the mark of Vicuna v0, the one that MiniGPT-4 on Vicuna needs",
            V0_VOCABULARY - 1: "LLaMA, Llama-2, or Vicuna v1.1 and later; Vicuna v0 has one more",
        }
        tokens = sizes.get("tokens", 0)
        return (f"{tokens} tokens: {known[int(tokens)]}",) if tokens in known else ()
    if kind in (Kind.PROJECTION, Kind.TRAINER) and sizes:
        pair = (int(sizes["in"]), int(sizes["out"]))
        return (f"it belongs to {FITS.get(pair, 'no model that is known here')}",)
    return ()
