"""Embeddings of pictures, kept: a picture that was shown before is not encoded again.

For: the least recently used cache, its keys, and the way of a picture through it (decode, look up, preprocess, encode
what is new in one batch). Not for: opening picture files (`data/images.py`), the encoder (`generation/engine.py`).
Holds no jax: an embedding is whatever `encode` gives for a picture, on a device or not.

Not in the original, which encodes a picture once per conversation and forgets it with it.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import PREPROCESSING, load_image, preprocess

MAX_BYTES = 256 * 2**20
"""What a model keeps of embeddings: some 1,000 pictures of Vicuna 7B, 7,000 of `smol`."""
MAX_BATCH = 16
"""Most pictures that are encoded at once: what bounds the memory of the image tower's activations."""


class ImageKey(NamedTuple):
    """What an embedding depends on, and nothing else."""

    model: str
    """Fingerprint of the weights that encode, with their dtype."""
    preprocessing: str
    """Version of the code between the decoded picture and the tower, with its settings."""
    pixels: str
    """SHA-256 of the decoded RGB bytes with the picture's size: `hash_pixels`."""


def hash_pixels(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and bytes: two files of the same picture have one."""
    width, height = image.size
    digest = hashlib.sha256(f"{width}x{height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class ImageCache:
    """A map that forgets what was used longest ago as soon as it holds more than `max_bytes`. Any thread may use it."""

    def __init__(self, max_bytes: int) -> None:
        """Raises `UserError` for a negative bound; 0 keeps nothing."""
        if max_bytes < 0:
            raise UserError(f"max_bytes is {max_bytes}; expected 0 (nothing is kept) or more.")
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.num_bytes = 0
        """What is kept now, as it was declared to `put`."""
        self.hits = 0
        """How often `get` found something."""
        self.misses = 0
        """How often `get` found nothing."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Any | None:
        """What was put there, which thereby is the latest used; None if it is not kept (any more)."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return found[0]

    def peek(self, key: Hashable) -> Any | None:
        """As `get`, but it counts nothing and makes nothing the latest used."""
        with self._lock:
            return self._kept.get(key, (None, 0))[0]

    def put(self, key: Hashable, value: Any, *, num_bytes: int) -> None:
        """Keeps `value`, and drops the longest unused ones until all fit; one that is larger than all is not kept."""
        with self._lock:
            _, before = self._kept.pop(key, (None, 0))
            self.num_bytes -= before
            if num_bytes > self.max_bytes:
                return
            self._kept[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                _, (_, dropped) = self._kept.popitem(last=False)
                self.num_bytes -= dropped


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A decoded picture on its way to the tower: made by `ImageEncoder.prepare` on any thread, taken like a picture."""

    key: ImageKey
    pixels: Float[np.ndarray, "height width 3"] | None
    """Normalised; None where the embedding is known."""
    embeds: Any
    """The embedding, where it was in the cache; else None."""


Picture = str | Path | bytes | Image.Image | PreparedImage
"""A path, the bytes of a file, an open picture, or one that is decoded already."""


class ImageEncoder:
    """Pictures to embeddings, through a cache.

    Args:
        encode: float32 `[I, height, width, 3]` to something with one embedding `[T, D]` per place and `nbytes`.
        model: the fingerprint for the keys.
        size, mean, std: what `preprocess` takes.
    """

    def __init__(
        self,
        encode: Callable[[Float[np.ndarray, "I height width 3"]], Any],
        cache: ImageCache,
        *,
        model: str,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.cache = cache
        self._encode = encode
        self._model = model
        self._preprocess = functools.partial(preprocess, size=size, mean=mean, std=std)
        self._version = f"{PREPROCESSING} {size} {tuple(mean)} {tuple(std)}"

    def prepare(self, picture: Picture) -> PreparedImage:
        """Decodes, hashes and preprocesses a picture; touches no device. Raises `UserError` if it is no picture."""
        if isinstance(picture, PreparedImage):
            return picture
        image = load_image(picture)
        key = ImageKey(self._model, self._version, hash_pixels(image))
        found = self.cache.peek(key)
        pixels = self._preprocess(image) if found is None else None
        return PreparedImage(key, pixels, found)

    def embed(self, pictures: Sequence[Picture]) -> list[Any]:
        """One embedding `[T, D]` per picture; a picture that stands here twice, or stood before, is encoded once.

        Raises:
            UserError: one of them is no picture; nothing was encoded.
        """
        prepared = [self.prepare(picture) for picture in pictures]
        found: dict[ImageKey, Any] = {}
        new: dict[ImageKey, Any] = {}
        for one in prepared:
            if one.key in new or one.key in found:
                continue
            # Asked again here: since it was prepared, another one of its kind may have been encoded.
            embeds = self.cache.get(one.key)
            found_now = one.embeds if embeds is None else embeds
            if found_now is None:
                new[one.key] = one.pixels
            else:
                found[one.key] = found_now
        keys = list(new)
        for first in range(0, len(keys), MAX_BATCH):
            batch = keys[first : first + MAX_BATCH]
            embeds = self._encode(np.stack([new[key] for key in batch]))
            for key, one in zip(batch, embeds, strict=True):
                found[key] = one
                self.cache.put(key, one, num_bytes=int(one.nbytes))
        return [found[one.key] for one in prepared]
