"""Reads a `tokenizer.model` (sentencepiece) into its pieces, scores and kinds, and refuses settings that LLaMA's lacks.

For: the vocabularies of LLaMA 1 and 2 and of Vicuna. The file is one protobuf message, of which this needs a dozen
fields, so they are read straight from the wire format (https://protobuf.dev/programming-guides/encoding); names and
numbers of the fields are those of sentencepiece_model.proto.
Not for: encoding text (`llama_tokenizer.py` hands that to the `tokenizers` library), nor unigram models.

Differs from the `sentencepiece` package, which tells pieces and scores but not how text is normalised before (its
module that does tells it under one release of protobuf only). Tests compare with it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_jax.config import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, by the numbers that sentencepiece and GGUF give them."""

_BPE = 2  # TrainerSpec.ModelType
_LARGEST = 1 << 26  # bytes: over a hundred times the file of LLaMA


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The pieces in the order of their ids, and what merging them needs."""

    where: str
    """The file, in the words of an error message."""
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    """The highest is merged first."""
    kinds: tuple[int, ...]
    bos_id: int
    eos_id: int

    def __post_init__(self) -> None:
        n = len(self.pieces)
        if len(self.scores) != n or len(self.kinds) != n or not n:
            raise UserError(
                f"{self.where} has {n} pieces, {len(self.scores)} scores and {len(self.kinds)} kinds; expected one of "
                "each per piece. Fetch it again."
            )
        for role, token_id in (("bos", self.bos_id), ("eos", self.eos_id)):
            if not 0 <= token_id < n or self.kinds[token_id] != CONTROL:
                raise UserError(
                    f"{self.where} has the {role} id {token_id}, which is no control piece; expected <s> and </s> as "
                    "LLaMA has them. This is another model's tokenizer."
                )


def read_sentencepiece(path: Path) -> Vocabulary:
    """Reads a sentencepiece model of LLaMA's kind: BPE with byte fallback, text left as it is but for a space in front.

    Raises:
        UserError: no such file, damaged, or a model with other settings; all of these are listed.
    """
    data = _read(path)
    if data.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a pointer that Git LFS left in the file's place; expected the file of some 500 kB. Run "
            "`git lfs pull` there, or fetch it again."
        )
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(memoryview(data)):
            if number == 1:
                fields = dict(_fields(value))
                text = bytes(fields[1]).decode("utf-8")
                pieces.append((text, _float(fields.get(2)), int(fields.get(3, NORMAL))))
            elif number == 2:
                trainer |= dict(_fields(value))
            elif number == 3:
                normalizer |= dict(_fields(value))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no whole sentencepiece model ({error!r}); expected LLaMA's tokenizer.model. Fetch it again."
        ) from error
    if not pieces:
        raise UserError(
            f"{path} holds no pieces; expected LLaMA's tokenizer.model. Fetch it again."
        )
    _require_llama_settings(path, trainer, normalizer)
    return Vocabulary(
        where=str(path),
        pieces=tuple(text for text, _, _ in pieces),
        scores=tuple(score for _, score, _ in pieces),
        kinds=tuple(kind for _, _, kind in pieces),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
    )


def _require_llama_settings(
    path: Path, trainer: dict[int, Any], normalizer: dict[int, Any]
) -> None:
    """Compares every setting that decides about ids; the defaults are those of sentencepiece_model.proto."""
    settings = {
        "model_type (1 unigram, 2 BPE)": (trainer.get(3, 1), _BPE),
        "byte_fallback": (trainer.get(35, 0), 1),
        "treat_whitespace_as_suffix": (trainer.get(24, 0), 0),
        "normalisation rules, bytes of": (len(normalizer.get(2, b"")), 0),
        "add_dummy_prefix": (normalizer.get(3, 1), 1),
        "remove_extra_whitespaces": (normalizer.get(4, 1), 0),
        "escape_whitespaces": (normalizer.get(5, 1), 1),
    }
    wrong = [
        f"{name} is {have}, expected {want}"
        for name, (have, want) in settings.items()
        if have != want
    ]
    if wrong:
        raise UserError(
            f"{path} is a sentencepiece model, but not of LLaMA's kind: {'; '.join(wrong)}. Take the tokenizer.model "
            "that came with the language model."
        )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(
                f"{path} has {path.stat().st_size / 1e6:.0f} MB; expected a tokenizer.model of some 500 kB."
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected LLaMA's tokenizer.model."
        ) from error


# --- protobuf's wire format -------------------------------------------------------------------------------------------


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: an int, the 4 or 8 bytes of a number, or the bytes of the rest."""
    if not isinstance(data, memoryview):
        raise ValueError("a number where a message should be")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire_type, 0)
        if not number or wire_type not in (1, 2, 5) or at + size > len(data):
            raise ValueError(f"damaged at byte {at} of {len(data)}")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; the highest bit says that more follow. -> (value, where it ended)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"damaged at byte {at} of {len(data)}")


def _float(value: Any) -> float:
    return 0.0 if value is None else float(struct.unpack("<f", value)[0])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
