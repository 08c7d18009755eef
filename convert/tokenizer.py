"""A language model's tokenizer -> `tokenizer.json` (Hugging Face `tokenizers`) and `tokenizer_config.json` beside it.

For: `convert_tokenizer`, which takes what a person has (a `tokenizer.model`, a `tokenizer.json`, a GGUF file, or the
folder of a language model), and byte-level BPE vocabularies of GGUF files whose pre-tokenizer is known here. What is
particular to LLaMA is in `llama_tokenizer.py`. Not for: using a tokenizer (`minigpt4_jax.data.tokenizer`).

Differs from the original, which hands the folder to `transformers` and takes what comes: a vocabulary that does not fit
the language model is found there by an index error on the device, if at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from convert.llama_tokenizer import (
    ADDED_ROW,
    fast_vocabulary,
    gguf_vocabulary,
    make_llama_tokenizer,
    roles,
)
from convert.replacing import replacing
from convert.sentencepiece_model import CONTROL, NORMAL, read_sentencepiece
from convert.sources import GgufSource
from minigpt4_jax.config import UserError

MODEL, FAST, CONFIG, ADDED = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
_KIND, _GGUF = "tokenizer.ggml.model", "The GGUF file"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit alone, then the byte-level pattern of GPT-2."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {"smollm": _smollm}
"""By the name in `tokenizer.ggml.pre`. Each splits text in its own way, so an unknown name is an error."""


@dataclass(frozen=True, kw_only=True)
class ConvertedTokenizer:
    """What `convert_tokenizer` did."""

    source: Path
    """The file that was read."""
    vocab_size: int
    """Ids, control tokens included."""
    roles: Mapping[str, str]
    """`bos_token`, `eos_token`... -> its text, as in `tokenizer_config.json`."""
    files: tuple[str, ...]
    """Names of what was written."""
    notes: tuple[str, ...]
    """Decisions that a person should hear of, a sentence each."""


def convert_tokenizer(
    source: Path, out: Path, *, vocab_size: int | None = None
) -> ConvertedTokenizer:
    """Writes the tokenizer of a language model into the folder `out`.

    A `tokenizer.model` comes before a `tokenizer.json` beside it, since it is what the original reads; a copy of it is
    kept. Without one, a LLaMA's `tokenizer.json` is put back to the original's treatment of spaces, and a byte-level
    one is copied.

    Args:
        source: `tokenizer.model`, `tokenizer.json`, a `.gguf`, or a folder (or any weight file in it) that holds one of
            the first two. For a folder of Meta's (`params.json`) the folder above is looked at too.
        vocab_size: rows of the language model's embedding, compared with the tokenizer. One row more than there are
            pieces is Vicuna v0's `[PAD]`, and becomes a control token of that name.

    Raises:
        UserError: no tokenizer there, one that cannot be used, or one that does not fit `vocab_size`.
    """
    file = _find(source)
    if file.suffix == ".gguf":
        return _convert_gguf(file, out, vocab_size)
    if file.suffix == ".json":
        return _convert_fast(file, out, vocab_size)
    vocabulary = read_sentencepiece(file)
    added, notes = _added(file, vocabulary.pieces, vocab_size)
    if (file.with_name(FAST)).is_file():
        notes.append(
            f"{MODEL} was read, the {FAST} beside it was not: the former is what the original reads."
        )
    named = roles(vocabulary)
    _require_same_roles(file, named)
    backend = make_llama_tokenizer(vocabulary, added=added)
    files = _write(out, backend.to_str(pretty=True), named)
    with replacing(out / MODEL) as partial:
        shutil.copyfile(file, partial)
    return _converted(file, backend, named, (*files, MODEL), notes)


def make_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that a GGUF file describes: LLaMA's, or byte-level BPE.

    Args:
        metadata: of a `GgufSource`.

    Raises:
        UserError: no tokenizer in the file, or one of a kind that is not known here.
    """
    if metadata.get(_KIND) == "llama":
        return make_llama_tokenizer(gguf_vocabulary(metadata, where=_GGUF))
    return _make_byte_level(metadata)


def read_ids(folder: Path) -> tuple[int, dict[str, int]]:
    """Of a folder that was written here: the number of tokens, and `bos_token_id` and `eos_token_id`.

    Raises:
        UserError: files that are missing, damaged, or name no such tokens.
    """
    backend, stated = _backend(folder / FAST), _read_json(folder / CONFIG)
    ids: dict[str, int] = {}
    for role in ("bos_token", "eos_token"):
        token = stated.get(role)
        found = backend.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            raise UserError(
                f"{folder / CONFIG} says that the {role} is {token!r}; expected one of the {backend.get_vocab_size()} "
                "tokens. Convert the tokenizer again."
            )
        ids[f"{role}_id"] = found
    return backend.get_vocab_size(), ids


def _make_byte_level(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE with one of `PRE_TOKENIZERS`."""
    kind, pre = metadata.get(_KIND), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"The GGUF file has the tokenizer {kind!r} with the pre-tokenizer {pre!r}; expected 'llama', or 'gpt2' "
            f"(byte-level BPE) with one of {', '.join(map(repr, PRE_TOKENIZERS))}. Take a tokenizer.json of the model "
            "instead."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    odd = sorted(set(types) - {NORMAL, CONTROL})
    if odd or len(types) != len(tokens):
        raise UserError(
            f"The GGUF file has {len(tokens)} tokens and {len(types)} token types, among them {odd}; expected one type "
            f"per token, {NORMAL} (ordinary) or {CONTROL} (control)."
        )
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL
        ]
    )
    if tokenizer.get_vocab_size() != len(tokens):
        raise UserError(
            f"The GGUF file lists {len(tokens)} tokens but only {tokenizer.get_vocab_size()} different ones; "
            "expected every token once. Fetch the file again."
        )
    return tokenizer


def _gguf_roles(metadata: Mapping[str, Any]) -> dict[str, str]:
    if metadata.get(_KIND) == "llama":
        return roles(gguf_vocabulary(metadata, where=_GGUF))
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    named = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in keys.items()}
    found = {role: tokens[token_id] for role, token_id in named.items() if token_id is not None}
    if "tokenizer.chat_template" in metadata:
        found["chat_template"] = metadata["tokenizer.chat_template"]
    return found


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


# --- convert_tokenizer, case by case ----------------------------------------------------------------------------------


def _find(source: Path) -> Path:
    """The file to read."""
    if source.is_file() and source.suffix not in _WEIGHTS:
        if source.suffix in (".model", ".json", ".gguf"):
            return source
        raise UserError(
            f"{source} ends in {source.suffix!r}; expected a {MODEL}, a {FAST}, a .gguf, or a folder with one of them."
        )
    folder = source.parent if source.is_file() else source
    places = [folder / MODEL, folder / FAST]
    # Meta keeps one tokenizer above the folders of all sizes.
    if (folder / "params.json").is_file():
        places.append(folder.absolute().parent / MODEL)
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"There is no tokenizer for {source}: looked for {', '.join(map(str, places))}. Copy the {MODEL} of the "
        "language model (LLaMA, Vicuna and Llama-2 come with one) beside its weights, or give its path."
    )


def _convert_gguf(file: Path, out: Path, vocab_size: int | None) -> ConvertedTokenizer:
    metadata = GgufSource(file).metadata
    backend, named = make_tokenizer(metadata), _gguf_roles(metadata)
    _require_size(file, backend.get_vocab_size(), vocab_size)
    files = _write(out, backend.to_str(pretty=True), named)
    return _converted(file, backend, named, files, [])


def _convert_fast(file: Path, out: Path, vocab_size: int | None) -> ConvertedTokenizer:
    described, backend = _read_json(file), _backend(file)
    if (described.get("decoder") or {}).get("type") == "ByteLevel":
        _require_size(file, backend.get_vocab_size(), vocab_size)
        named = {k: v for k, v in _stated_roles(file).items() if v}
        files = _write(out, file.read_text(encoding="utf-8"), named)
        return _converted(file, backend, named, files, ["A byte-level tokenizer: copied as it is."])
    vocabulary, added = fast_vocabulary(file, described)
    more, notes = _added(file, (*vocabulary.pieces, *added), vocab_size)
    notes.append(
        f"There is no {MODEL}: made from {FAST}, with spaces treated as the original does. If you have the {MODEL}, "
        "put it there."
    )
    named = roles(vocabulary)
    _require_same_roles(file, named)
    backend = make_llama_tokenizer(vocabulary, added=(*added, *more))
    files = _write(out, backend.to_str(pretty=True), named)
    return _converted(file, backend, named, files, notes)


def _added(
    file: Path, pieces: tuple[str, ...], vocab_size: int | None
) -> tuple[list[str], list[str]]:
    """The control tokens behind the pieces, and what there is to say about them."""
    beside = file.with_name(ADDED)
    stated: dict[str, int] = _read_json(beside) if beside.is_file() else {}
    known = {piece: i for i, piece in enumerate(pieces)}
    wrong = {t: i for t, i in stated.items() if t in known and known[t] != i}
    added = sorted((t for t in stated if t not in known), key=lambda t: stated[t])
    if wrong or [stated[t] for t in added] != list(range(len(pieces), len(pieces) + len(added))):
        raise UserError(
            f"{beside} says {stated}, which does not go on from the {len(pieces)} tokens of {file.name}. The two "
            "belong to different models: fetch the folder again."
        )
    notes = [f"{ADDED}: {', '.join(added)} became control tokens."] if added else []
    if vocab_size == len(pieces) + 1 and not added:
        added = [ADDED_ROW]
        notes.append(
            f"The language model has one row more than {file.name} has pieces: {ADDED_ROW} of Vicuna v0, a control "
            "token."
        )
    _require_size(file, len(pieces) + len(added), vocab_size)
    return added, notes


def _require_size(file: Path, found: int, vocab_size: int | None) -> None:
    if vocab_size is not None and vocab_size != found:
        raise UserError(
            f"{file} has {found} tokens, the language model has {vocab_size} rows; expected as many, or one row more "
            "(Vicuna v0). Take the tokenizer that came with the language model."
        )


def _require_same_roles(file: Path, named: Mapping[str, str]) -> None:
    """The control tokens that files beside it state have to be the vocabulary's own; pad is the original's `$$`."""
    for role, text in _stated_roles(file).items():
        if role != "pad_token" and text and text != named[role]:
            raise UserError(
                f"Beside {file} the {role} is said to be {text!r}; expected {named[role]!r}, which the original's "
                "templates are written for. This is another model's tokenizer."
            )


def _stated_roles(file: Path) -> dict[str, str]:
    """bos, eos, unk and pad as the JSON files beside `file` say; early folders of LLaMA say "" for all."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG):
        beside = file.with_name(name)
        stated = _read_json(beside) if beside.is_file() else {}
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = stated.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[role] = text
    return found


def _backend(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises the bare Exception class
        raise UserError(f"{file} cannot be read ({error}). Fetch it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}). Fetch it again.") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{file} holds a {type(found).__name__}; expected an object. Fetch it again."
        )
    return found


def _write(folder: Path, backend: str, named: Mapping[str, str]) -> tuple[str, ...]:
    """Both files; each appears whole. Returns their names."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    texts = {FAST: backend, CONFIG: json.dumps(config, ensure_ascii=False, indent=2) + "\n"}
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return tuple(texts)


def _converted(
    file: Path,
    backend: tokenizers.Tokenizer,
    named: Mapping[str, str],
    files: tuple[str, ...],
    notes: list[str],
) -> ConvertedTokenizer:
    return ConvertedTokenizer(
        source=file,
        vocab_size=backend.get_vocab_size(),
        roles=named,
        files=files,
        notes=tuple(notes),
    )
