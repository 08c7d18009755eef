"""LLaMA's vocabulary -> a `tokenizers` backend that gives the ids of the original's slow LLaMA tokenizer.

For: the pieces of a `tokenizer.model` or a GGUF file, and the `tokenizer.json` of a LLaMA folder that has no
`tokenizer.model`. Not for: finding and writing files (`tokenizer.py`), using a tokenizer
(`minigpt4_jax.data.tokenizer`).

Every text gets a space in front, then spaces become "▁", characters are merged into pieces (the highest score first,
the leftmost among equals), and what has no piece becomes bytes. Since `Tokenizer` is given what lies between two
pictures or control tokens as texts of their own, each of these gets its space, as in the original. The fast LLaMA
tokenizer of transformers 5 differs twice: text behind a control token gets none, and it merges runs of spaces first, of
which LLaMA's scores say that they come last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from convert.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)
from minigpt4_jax.config import UserError

SPACE = "\u2581"
"""How pieces write a space."""
PAD = "$$"
"""What the original pads with: an ordinary piece (id 3997 in LLaMA's vocabulary)."""
ADDED_ROW = "[PAD]"
"""The token that Vicuna v0 and its relatives added to LLaMA's 32,000."""

Merge = tuple[str, str]
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_SPACES = re.compile(f"{SPACE}{{2,}}")
_LAST = -1e9  # the score of LLaMA's runs of spaces


def make_llama_tokenizer(
    vocabulary: Vocabulary,
    *,
    added: Sequence[str] = (),
) -> tokenizers.Tokenizer:
    """Builds the tokenizer of a LLaMA vocabulary.

    Args:
        vocabulary: pieces by id. A user-defined one has to look like a marker (`<x>` or `[x]`): like those of `added`
            it becomes a control token, which typed text never turns into.
        added: control tokens with the ids after the last piece.

    Raises:
        UserError: a vocabulary that cannot be LLaMA's.
    """
    _require_llama(vocabulary)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(vocabulary.pieces)},
            merges=make_merges(vocabulary),
            unk_token=_unknown(vocabulary),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    controls = [
        piece
        for piece, kind in zip(vocabulary.pieces, vocabulary.kinds, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in (*controls, *added)
        ]
    )
    bos = vocabulary.pieces[vocabulary.bos_id]
    # For other readers of the file (transformers): this project puts control tokens in by itself.
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, vocabulary.bos_id)]
    )
    return backend


def make_merges(vocabulary: Vocabulary) -> list[Merge]:
    """Every pair of pieces that joins to a piece, in the order in which sentencepiece prefers them.

    Pieces with equal scores (LLaMA's runs of spaces) are joined from the left, so the longer left part goes first:
    it belongs to a run that has already begun.
    """
    ids = {
        piece: i
        for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
        if kind == NORMAL
    }
    found = [
        (-vocabulary.scores[i], -at, i, piece[:at], piece[at:])
        for piece, i in ids.items()
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def pad_token(pieces: Iterable[str], *, unknown: str) -> str:
    """`$$` where the vocabulary has it; else the unknown token, of which the original then gets the id."""
    return PAD if PAD in set(pieces) else unknown


def roles(vocabulary: Vocabulary) -> dict[str, str]:
    """bos, eos, unk and pad, under the keys of a `tokenizer_config.json`."""
    unknown = _unknown(vocabulary)
    return {
        "bos_token": vocabulary.pieces[vocabulary.bos_id],
        "eos_token": vocabulary.pieces[vocabulary.eos_id],
        "unk_token": unknown,
        "pad_token": pad_token(vocabulary.pieces, unknown=unknown),
    }


def gguf_vocabulary(metadata: Mapping[str, Any], *, where: str) -> Vocabulary:
    """The vocabulary of a GGUF file whose `tokenizer.ggml.model` is `llama`. (Its merges, if any, are not needed.)

    Raises:
        UserError: keys are missing, or text is prepared in another way than LLaMA's.
    """
    prefix = "tokenizer.ggml."
    needed = ("tokens", "scores", "token_type", "bos_token_id", "eos_token_id")
    missing = [prefix + key for key in needed if prefix + key not in metadata]
    if missing:
        raise UserError(
            f"{where} has a LLaMA tokenizer but does not say {', '.join(missing)}. Take the tokenizer.model of the "
            "language model instead."
        )
    settings = {
        "add_space_prefix": (metadata.get(f"{prefix}add_space_prefix", True), True),
        "remove_extra_whitespaces": (
            metadata.get(f"{prefix}remove_extra_whitespaces", False),
            False,
        ),
        "precompiled_charsmap, bytes of": (
            len(metadata.get(f"{prefix}precompiled_charsmap", ())),
            0,
        ),
    }
    wrong = [
        f"{name} is {have}, expected {want}"
        for name, (have, want) in settings.items()
        if have != want
    ]
    if wrong:
        raise UserError(f"The tokenizer in {where} is not of LLaMA's kind: {'; '.join(wrong)}.")
    return Vocabulary(
        where=where,
        pieces=tuple(metadata[f"{prefix}tokens"]),
        scores=tuple(metadata[f"{prefix}scores"]),
        kinds=tuple(metadata[f"{prefix}token_type"]),
        bos_id=metadata[f"{prefix}bos_token_id"],
        eos_id=metadata[f"{prefix}eos_token_id"],
    )


def fast_vocabulary(path: Path, described: Mapping[str, Any]) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of a LLaMA's `tokenizer.json`, and the control tokens that were added to it.

    The file has no scores, and transformers 5 writes its merges in another order than theirs. But the scores of LLaMA
    (and of Mistral) fall with the ids, except that runs of spaces come last; so they are put back, after a check that
    the file merges the very pairs that follow from the pieces.

    Raises:
        UserError: another kind of tokenizer, or one whose spaces are treated in a way that is not LLaMA's.
    """
    model = described.get("model") or {}
    ids: dict[str, int] = model.get("vocab") or {}
    unknown = model.get("unk_token") or "<unk>"  # transformers 5 leaves it out
    special = {token["content"]: int(token["id"]) for token in described.get("added_tokens") or []}
    pieces = sorted(ids, key=lambda piece: ids[piece])
    added = sorted((t for t in special if t not in ids), key=lambda t: special[t])
    numbers = [ids[p] for p in pieces] + [special[t] for t in added]
    wanted = {
        "model.type": (model.get("type", "BPE"), "BPE"),
        "model.byte_fallback": (model.get("byte_fallback"), True),
        "model.ignore_merges": (model.get("ignore_merges", False), False),
        "model.dropout": (model.get("dropout"), None),
        "a space is put in front and all become \u2581": (_has_llama_spaces(described), True),
        "ids without gaps": (numbers == list(range(len(numbers))), True),
        "<s>, </s> and an unknown token": ({"<s>", "</s>", unknown} <= ids.keys(), True),
    }
    _require_settings(path, wanted)

    def kind(piece: str) -> int:
        if piece == unknown:
            return UNKNOWN
        if piece in ("<s>", "</s>"):
            return CONTROL
        if piece in special:
            return USER_DEFINED
        return BYTE if _BYTE_PIECE.fullmatch(piece) else NORMAL

    vocabulary = Vocabulary(
        where=str(path),
        pieces=tuple(pieces),
        scores=tuple(_LAST if _SPACES.fullmatch(piece) else -float(ids[piece]) for piece in pieces),
        kinds=tuple(kind(piece) for piece in pieces),
        bos_id=ids["<s>"],
        eos_id=ids["</s>"],
    )
    stated = {tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]}
    expected = set(make_merges(vocabulary))
    _require_settings(
        path, {"merges that are not those of its pieces": (len(stated ^ expected), 0)}
    )
    return vocabulary, added


def _require_settings(path: Path, wanted: Mapping[str, tuple[Any, Any]]) -> None:
    wrong = [
        f"{k} is {have!r}, expected {want!r}" for k, (have, want) in wanted.items() if have != want
    ]
    if wrong:
        raise UserError(
            f"{path} is not a LLaMA tokenizer as known here: {'; '.join(wrong)}. Take the tokenizer.model of the "
            "language model instead: what it gives is what the original read."
        )


def _has_llama_spaces(described: Mapping[str, Any]) -> bool:
    """Whether spaces are treated in one of the two ways that LLaMA's files know: as transformers 4 wrote them (a space
    put in front of every part) or as 5 does (of the first part)."""
    normalizer, before = described.get("normalizer"), described.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if before is None:
        return bool(normalizer == {"type": "Sequence", "normalizers": [prepend, replace]})
    scheme = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    return normalizer is None and bool(before == scheme)


def _unknown(vocabulary: Vocabulary) -> str:
    return vocabulary.pieces[vocabulary.kinds.index(UNKNOWN)]


def _require_llama(vocabulary: Vocabulary) -> None:
    """Raises `UserError` with everything that keeps `make_llama_tokenizer` from giving the original's ids."""
    kinds, pieces = vocabulary.kinds, vocabulary.pieces
    of_kind = {
        k: [p for p, kind in zip(pieces, kinds, strict=True) if kind == k] for k in set(kinds)
    }
    problems = []
    if len(set(pieces)) != len(pieces):
        problems.append(f"{len(pieces) - len(set(pieces))} pieces are there twice")
    if kinds.count(UNKNOWN) != 1:
        problems.append(f"it has {kinds.count(UNKNOWN)} unknown pieces, expected 1")
    if {f"<0x{byte:02X}>" for byte in range(256)} != set(of_kind.get(BYTE, ())):
        problems.append(f"it has {kinds.count(BYTE)} byte pieces, expected <0x00> to <0xFF>")
    odd = [p for p in of_kind.get(USER_DEFINED, ()) if not _MARKER.fullmatch(p)]
    odd += of_kind.get(UNUSED, [])
    odd += [p for k, ps in of_kind.items() if not NORMAL <= k <= BYTE for p in ps]
    if odd:
        problems.append(f"user-defined or unused pieces: {', '.join(map(repr, odd[:8]))}")
    normal = set(of_kind.get(NORMAL, ()))
    split = [p for p in normal if len(p) > 1 and not normal.issuperset(p)]
    if split:  # sentencepiece would merge them all the same, `tokenizers` cannot
        problems.append(
            f"pieces with a character that is no piece: {', '.join(map(repr, sorted(split)[:8]))}"
        )
    if problems:
        raise UserError(
            f"{vocabulary.where} is not a vocabulary of LLaMA's kind: {'; '.join(problems)}. Take the tokenizer.model "
            "that came with the language model."
        )
