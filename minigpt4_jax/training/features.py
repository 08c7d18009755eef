"""Frozen vision features, computed once per picture and kept in a memory-mapped float16 file.

Exact as long as a picture is always seen the same way (no random crop): the tower is frozen. The file is keyed by the
pictures, the preprocessing and the tower's weights; a file with another key is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float16

from minigpt4_jax.config import UserError
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, apply_method

Features = Float16[np.ndarray, "N P C"]


def fingerprint(images: Sequence[Path], params: Params, *, preprocessing: str) -> str:
    """SHA-256 over every picture's bytes, the preprocessing's description and the tower's weights."""
    digest = hashlib.sha256(preprocessing.encode())
    for leaf in jax.tree.leaves({"vit": params["vit"], "ln_vision": params["ln_vision"]}):
        digest.update(np.asarray(leaf).tobytes())
    for path in images:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def encode_features(
    images: Sequence[Path],
    *,
    folder: Path,
    key: str,
    model: MiniGPT4,
    params: Params,
    preprocess: Callable[[Path], np.ndarray],
    batch_size: int,
    advance: Callable[[int], None],
) -> Features:
    """Returns features `[N, P, C]` (class token dropped) for the pictures, from `folder` if they are there.

    An interrupted encoding continues where it stopped. Half a file never passes for a whole one: it has another name
    until the last row is written.

    Args:
        key: from `fingerprint`; part of the file's name.
        preprocess: path -> float32 `[H, W, 3]`, normalised.
        advance: called with the number of newly finished pictures.

    Raises:
        UserError: the finished file does not have the expected shape.
    """
    cfg = model.config.vit
    shape = (len(images), cfg.num_patches, cfg.width)
    folder.mkdir(parents=True, exist_ok=True)
    done_path = folder / f"{key[:16]}.npy"
    if done_path.exists():
        features: Features = np.load(done_path, mmap_mode="r")
        if features.shape != shape:
            raise UserError(
                f"{done_path} has shape {features.shape}; expected {shape}. Delete it to encode again."
            )
        advance(len(images))
        return features

    partial, counter = folder / f"{key[:16]}.partial.npy", folder / f"{key[:16]}.partial.json"
    start = json.loads(counter.read_text())["done"] if counter.exists() and partial.exists() else 0
    store = np.lib.format.open_memmap(
        partial, mode="r+" if start else "w+", dtype=np.float16, shape=shape
    )
    if not start:  # a full disk is an error here and now, not a bus error in the middle
        with partial.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
    encode = jax.jit(lambda params, x: apply_method(model, params, "encode_vision", x)[0][:, 1:])
    vision = {"vit": params["vit"], "ln_vision": params["ln_vision"]}
    advance(start)
    for first in range(start, len(images), batch_size):
        paths = images[first : first + batch_size]
        pixels = np.stack([preprocess(path) for path in paths])
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - len(paths), axis=0)])
        store[first : first + len(paths)] = np.asarray(encode(vision, padded))[: len(paths)]
        store.flush()
        beside = counter.with_suffix(".tmp")
        beside.write_text(json.dumps({"done": first + len(paths)}))
        os.replace(beside, counter)
        advance(len(paths))
    os.replace(partial, done_path)
    counter.unlink(missing_ok=True)
    whole: Features = np.load(done_path, mmap_mode="r")
    return whole
