"""Frozen vision features, computed once per picture and kept in a memory-mapped float16 file.

Exact as long as a picture is always seen the same way (no random crop): the tower is frozen. The file is keyed by the
pictures, the preprocessing and the weights of the tower (and the Q-Former); a file with another key is not used. A
picture that cannot be decoded is noted beside the file. Not for: sets too large to be encoded beforehand (`vision.py`
encodes in the loop).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float16

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, apply_method

Features = Float16[np.ndarray, "N R C"]


class Encoded(NamedTuple):
    """Features of all pictures, and which of them are none."""

    features: Features
    faults: dict[int, SampleFault]
    """By row: pictures that could not be decoded. Their features are zeros and must not be used."""


def fingerprint(
    images: Iterable[bytes],
    weights: Mapping[str, str],
    *,
    config: ModelConfig,
    preprocessing: str,
) -> str:
    """SHA-256 over every picture's file, the preprocessing's description and the weights that make features.

    Args:
        weights: `FrozenWeights.fingerprints`; those of `config.vision_parts` count.
    """
    digest = hashlib.sha256(preprocessing.encode())
    for name in config.vision_parts:
        digest.update(f"{name} {weights[name]};".encode())
    for data in images:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def encode_features(
    count: int,
    *,
    folder: Path,
    key: str,
    model: MiniGPT4,
    load_params: Callable[[], Params],
    preprocess: Callable[[int], np.ndarray],
    batch_size: int,
    advance: Callable[[int], None],
) -> Encoded:
    """Returns features `[N, *config.feature_shape]` of `count` pictures, from `folder` if they are there.

    An interrupted encoding continues where it stopped. Half a file never passes for a whole one: it has another name
    until the last row is written.

    Args:
        key: from `fingerprint`; part of the file's name.
        load_params: the parameters `config.vision_parts`, asked for only if a picture is left to encode.
        preprocess: number of a picture -> float32 `[H, W, 3]`, normalised; or raises `SampleFault`.
        advance: called with the number of newly finished pictures.

    Raises:
        UserError: the finished file does not have the expected shape.
    """
    size = model.config.vit.image_size
    shape = (count, *model.config.feature_shape)
    folder.mkdir(parents=True, exist_ok=True)
    done_path, faults_path = folder / f"{key[:16]}.npy", folder / f"{key[:16]}.faults.json"
    if done_path.exists():
        features: Features = np.load(done_path, mmap_mode="r")
        if features.shape != shape:
            raise UserError(
                f"{done_path} has shape {features.shape}; expected {shape}. Delete it to encode again."
            )
        advance(count)
        known = json.loads(faults_path.read_text()) if faults_path.exists() else {}
        return Encoded(features, _read_faults(known))

    partial, counter = folder / f"{key[:16]}.partial.npy", folder / f"{key[:16]}.partial.json"
    start, faults = 0, {}
    if counter.exists() and partial.exists():
        before = json.loads(counter.read_text())
        start, faults = before["done"], before["faults"]
    store = np.lib.format.open_memmap(
        partial, mode="r+" if start else "w+", dtype=np.float16, shape=shape
    )
    if not start:  # a full disk is an error here and now, not a bus error in the middle
        with partial.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
    encode = make_picture_encoder(model)
    vision = load_params()
    advance(start)
    for first in range(start, count, batch_size):
        last = min(count, first + batch_size)
        pixels = np.zeros((batch_size, size, size, 3), np.float32)
        bad = []
        for row in range(first, last):
            try:
                pixels[row - first] = preprocess(row)
            except SampleFault as fault:
                faults[str(row)] = [fault.reason, str(fault)]
                bad.append(row)
        store[first:last] = np.asarray(encode(vision, pixels))[: last - first]
        store[bad] = 0
        store.flush()
        _write_json(counter, {"done": last, "faults": faults})
        advance(last - first)
    if faults:
        _write_json(faults_path, faults)
    os.replace(partial, done_path)
    counter.unlink(missing_ok=True)
    whole: Features = np.load(done_path, mmap_mode="r")
    return Encoded(whole, _read_faults(faults))


def make_picture_encoder(model: MiniGPT4) -> Callable[[Params, np.ndarray | jax.Array], jax.Array]:
    """The compiled image path: the parameters `vision_parts` and pixels [B, H, W, 3] to features [B, R, C]."""
    return jax.jit(lambda params, x: apply_method(model, params, "encode_vision", x)[0])


def _read_faults(faults: dict[str, list[str]]) -> dict[int, SampleFault]:
    return {int(row): SampleFault(*fault) for row, fault in faults.items()}


def _write_json(path: Path, content: object) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content))
    os.replace(beside, path)
