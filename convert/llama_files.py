"""One call that opens whatever a person has as a language model, ready for the rule engine.

For: `open_llama`: a Hugging Face folder, a folder of Meta's, a GGUF file, or a base with a Vicuna delta.
Not for: the tables (`llama.py`), Meta's shards (`meta.py`) and the sum with a delta (`delta.py`) themselves.

Differs from the original, which hands a path to `transformers`: that takes the first kind of file it finds, and cannot
read Meta's.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from convert import detect
from convert.delta import DeltaSource
from convert.llama import (
    GGUF_EXCUSES,
    gguf_config,
    gguf_rules,
    hf_config,
    hf_excuses,
    hf_rules,
)
from convert.meta import META_EXCUSES, MetaSource, is_meta_folder, meta_config
from convert.rules import Excuse, Rule
from convert.sources import GgufSource, TensorSource, open_source
from minigpt4_jax.config import LlamaConfig, UserError

EMBEDDING = "model.embed_tokens.weight"
SINGLE = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
INDEX = {
    ".safetensors": "model.safetensors.index.json",
    ".bin": "pytorch_model.bin.index.json",
}
"""What Hugging Face calls the files, by kind."""


@dataclass(frozen=True)
class OpenedLlama:
    """A language model, and the table that reads it."""

    source: TensorSource
    config: LlamaConfig
    rules: tuple[Rule, ...]
    excuses: tuple[Excuse, ...]
    notes: tuple[str, ...] = ()
    """What was chosen among several, for the person."""


def open_llama(
    path: Path, *, delta: Path | None = None, max_positions: int | None = None
) -> OpenedLlama:
    """Opens a language model, reading a few norms and nothing else.

    Args:
        path: a Hugging Face folder, a folder with Meta's `consolidated.NN.pth`, or a `.gguf` file.
        delta: a Vicuna delta for it, a Hugging Face folder.
        max_positions: of the model, where the caller knows it; needed for Meta's files, which do not say it.

    Raises:
        UserError: nothing that can be read, two models in one folder, a delta given as a model or the reverse, or a
            delta that does not fit.
    """
    if delta is not None and max_positions is None:
        max_positions = _open_delta_config(delta).max_positions
    base = open_unchecked(path, max_positions=max_positions)
    detect.require_merged(base.source)
    return base if delta is None else _with_delta(base, delta)


def open_unchecked(path: Path, *, max_positions: int | None = None) -> OpenedLlama:
    """`open_llama` without a look at the values: the result may be a delta."""
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path)
    if path.is_file():
        raise UserError(
            f"{path} is one file; the sizes of a language model lie beside it (config.json, or Meta's params.json). "
            f"Give its folder {path.parent}, or a .gguf file."
        )
    if not path.exists():
        raise UserError(f"There is no {path}; expected {detect.TAKES['--llm']}.")
    meta, hugging_face = is_meta_folder(path), (path / "config.json").exists()
    if meta and hugging_face:
        raise UserError(
            f"{path} holds both consolidated.*.pth (Meta's) and config.json (Hugging Face's): two forms of a model, "
            "perhaps of two models. Put one of them into a folder of its own."
        )
    if meta:
        source = MetaSource(path)
        config = meta_config(source, max_positions=max_positions)
        excuses = (*hf_excuses(config), *META_EXCUSES)
        return OpenedLlama(source, config, hf_rules(config), excuses)
    return _hugging_face(path)


def _gguf(path: Path) -> OpenedLlama:
    source = GgufSource(path)
    config = gguf_config(source)
    return OpenedLlama(source, config, gguf_rules(config), GGUF_EXCUSES)


def _hugging_face(folder: Path) -> OpenedLlama:
    config = hf_config(folder)
    notes = _choose_weights(folder)
    source = open_source(folder)
    if EMBEDDING in source.names():
        rows = source.shape(EMBEDDING)[0]
        if rows != config.vocab_size:
            raise UserError(
                f"{folder}: config.json says vocab_size {config.vocab_size}, but {EMBEDDING} has {rows} rows. They "
                "contradict each other (transformers refuses the folder too). If the tensors are right, write "
                f'"vocab_size": {rows} into config.json; Vicuna v0 has 32001, LLaMA and Vicuna v1.1 32000.'
            )
    return OpenedLlama(source, config, hf_rules(config), hf_excuses(config), notes)


def _open_delta_config(path: Path) -> LlamaConfig:
    if not path.is_dir():
        raise UserError(f"{path} is no folder; expected {detect.TAKES['--delta']}.")
    return hf_config(path)


def _with_delta(base: OpenedLlama, path: Path) -> OpenedLlama:
    if isinstance(base.source, GgufSource):
        raise UserError(
            f"{base.source.describe()} is a GGUF file; a delta is added to the weights it was made from. Give the "
            "Hugging Face folder or Meta's files of LLaMA with --llm."
        )
    delta = _hugging_face(path)
    detect.require_delta(delta.source)
    source = DeltaSource(base.source, delta.source, excuses=base.excuses)
    config = dataclasses.replace(base.config, vocab_size=delta.config.vocab_size)
    differing = [
        f"{field.name} {getattr(base.config, field.name)} and {getattr(delta.config, field.name)}"
        for field in dataclasses.fields(LlamaConfig)
        if field.name not in ("vocab_size", "max_positions")
        and getattr(base.config, field.name) != getattr(delta.config, field.name)
    ]
    if differing:
        raise UserError(
            f"{base.source.describe()} and the delta {path} describe different models: {', '.join(differing)}. Give "
            "the LLaMA that the delta was made from."
        )
    notes = (*base.notes, *delta.notes)
    return OpenedLlama(source, config, base.rules, base.excuses, notes)


def _choose_weights(folder: Path) -> tuple[str, ...]:
    """Checks that `open_source` has only one answer, and says which files are left alone.

    Published folders often hold the same weights as safetensors and as .bin. safetensors are taken, as transformers
    does: no pickle, and every size is in the header. Two answers of one kind are refused.
    """
    kinds = []
    for kind in SINGLE:
        single, index = folder / SINGLE[kind], folder / INDEX[kind]
        if single.exists() and index.exists():
            raise UserError(
                f"{folder} holds both {single.name} and {index.name}; they may be two models. Remove one of them."
            )
        if index.exists():
            _require_one_kind(index, kind)
        if single.exists() or index.exists():
            kinds.append(kind)
    if not kinds:
        stray = sorted(p.name for kind in SINGLE for p in folder.glob(f"*{kind}"))
        also = f" It has {', '.join(stray)} without an index." if stray else ""
        raise UserError(
            f"The folder {folder} holds no weights under the names of Hugging Face.{also} Expected one of "
            f"{', '.join((*SINGLE.values(), *INDEX.values()))}. Fetch what is missing."
        )
    if len(kinds) == 1:
        return ()
    return (f"{folder} holds .safetensors and .bin files: the .safetensors are read",)


def _require_one_kind(index: Path, kind: str) -> None:
    """The index names files of its own kind, in its own folder."""
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index} cannot be read ({error!r}); expected the index of Hugging Face. Fetch it again."
        ) from error
    odd = sorted(
        str(name) for name in named if Path(str(name)).name != name or not name.endswith(kind)
    )
    if odd:
        raise UserError(
            f"{index} names {', '.join(odd)}; expected {kind} files beside it. The folder mixes two downloads; fetch "
            "it again."
        )
