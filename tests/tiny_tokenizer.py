"""A `tokenizer.model` of a few pieces, written in protobuf's wire format from the format's side, for tests."""

from __future__ import annotations

import struct
from pathlib import Path

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LOWEST = -1e9

Piece = tuple[str, float, int]


def tiny_pieces() -> list[Piece]:
    """As LLaMA orders them: unknown, bos, eos, bytes, merged pieces by score (runs of spaces last), characters."""
    merged = [f"{SPACE}{SPACE}", f"{SPACE}a", "at", f"{SPACE}c", f"{SPACE}cat", "##", f"{SPACE}##"]
    merged += [f"{SPACE}###", f"{SPACE * 4}", f"{SPACE * 3}", "$$", "<s", "<s>x"]
    characters = [SPACE, *"act#$<>sx[]INST"]
    pieces: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    for rank, text in enumerate(dict.fromkeys([*merged, *characters])):
        run = set(text) == {SPACE}
        pieces.append((text, LOWEST if run else -float(rank), NORMAL))
    return pieces


def write_model(
    path: Path,
    pieces: list[Piece] | None = None,
    *,
    trainer: dict[int, int] | None = None,
    normalizer: dict[int, int | bytes] | None = None,
) -> Path:
    """Writes a sentencepiece model with LLaMA's settings, or with those fields (by number) changed."""
    message = b""
    for text, score, kind in tiny_pieces() if pieces is None else pieces:
        piece = _text(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        message += _text(1, piece + (_number(3, kind) if kind != NORMAL else b""))
    message += _text(2, _message({3: 2, 35: 1, 40: 0, 41: 1, 42: 2} | (trainer or {})))
    rules: dict[int, int | bytes] = {1: b"identity", 2: b"", 3: 1, 4: 0, 5: 1}
    message += _text(3, _message(rules | (normalizer or {})))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(message)
    return path


def _message(fields: dict[int, int | bytes] | dict[int, int]) -> bytes:
    return b"".join(
        _number(number, value) if isinstance(value, int) else _text(number, value)
        for number, value in fields.items()
    )


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _text(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value
