"""minigpt4_jax.image_cache: what is kept and forgotten, what a key depends on, what is encoded."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import preprocess
from minigpt4_jax.image_cache import MAX_BATCH, ImageCache, ImageEncoder, hash_pixels

SETTINGS: dict[str, Any] = {"size": 4, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}


def noise(seed: int, width: int = 7, height: int = 5) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


class Tower:
    """Encodes a picture as its pixels, and notes the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        self.batches.append(len(images))
        return [image.reshape(-1, 3) for image in images]


def make_encoder(tower: Tower, cache: ImageCache, **changed: Any) -> ImageEncoder:
    return ImageEncoder(tower, cache, **{"model": "m", **SETTINGS, **changed})


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    cache = ImageCache(30)
    for key in "abc":
        cache.put(key, key.upper(), num_bytes=10)
    assert cache.get("a") == "A"
    cache.put("d", "D", num_bytes=15)
    assert [key for key in "abcd" if cache.peek(key) is not None] == ["a", "d"]
    assert (len(cache), cache.num_bytes) == (2, 25)


def test_what_is_put_again_counts_once_and_what_is_larger_than_all_is_not_kept() -> None:
    cache = ImageCache(30)
    cache.put("a", 1, num_bytes=20)
    cache.put("a", 2, num_bytes=25)
    assert (cache.get("a"), cache.num_bytes) == (2, 25)
    cache.put("b", 3, num_bytes=31)
    assert (cache.peek("b"), cache.peek("a"), cache.num_bytes) == (None, 2, 25)
    cache.put("a", 4, num_bytes=31)  # the old one is not what the caller put
    assert (cache.peek("a"), cache.num_bytes) == (None, 0)
    with pytest.raises(UserError, match="max_bytes is -1; expected 0"):
        ImageCache(-1)


def test_hits_and_misses_are_counted_and_a_peek_is_neither() -> None:
    cache = ImageCache(10)
    cache.put("a", 1, num_bytes=1)
    for key in "aab":
        cache.get(key)
    cache.peek("a")
    cache.peek("b")
    assert (cache.hits, cache.misses) == (2, 1)


def test_many_threads_leave_the_books_right() -> None:
    cache = ImageCache(100)

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 40, 2000).tolist():
            if cache.get(number) is None:
                cache.put(number, number, num_bytes=number % 7)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = [number for number in range(40) if cache.peek(number) is not None]
    assert cache.num_bytes == sum(number % 7 for number in kept) <= 100
    assert cache.hits + cache.misses == 8 * 2000
    assert len(cache) == len(kept)


def test_the_same_pixels_are_one_picture_and_the_same_bytes_in_another_shape_are_not() -> None:
    picture, buffer = noise(1), io.BytesIO()
    picture.save(buffer, "PNG")
    tower, cache = Tower(), ImageCache(10_000)
    encoder = make_encoder(tower, cache)
    (first,) = encoder.embed([picture])
    (again,) = encoder.embed([buffer.getvalue()])
    assert again is first
    assert (tower.batches, cache.hits, cache.misses) == ([1], 1, 1)
    wide, high = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (4, 6), "red")
    assert wide.tobytes() == high.tobytes()
    assert hash_pixels(wide) != hash_pixels(high)


@pytest.mark.parametrize(
    "changed", [{"model": "n"}, {"size": 5}, {"mean": (0.1, 0.2, 0.4)}, {"std": (1.0, 2.0, 4.0)}]
)
def test_another_model_or_preprocessing_does_not_find_the_embedding(
    changed: dict[str, Any],
) -> None:
    tower, cache = Tower(), ImageCache(10_000)
    make_encoder(tower, cache).embed([noise(1)])
    make_encoder(tower, cache, **changed).embed([noise(1)])
    assert tower.batches == [1, 1]


def test_new_pictures_are_encoded_together_each_once_and_given_in_order() -> None:
    tower, cache = Tower(), ImageCache(10_000)
    encoder = make_encoder(tower, cache)
    encoder.embed([noise(3)])
    found = encoder.embed([noise(1), noise(3), noise(2), noise(1)])
    assert tower.batches == [1, 2]
    assert (cache.hits, cache.misses) == (1, 3)  # a picture counts once in a call
    for seed, embeds in zip([1, 3, 2, 1], found, strict=True):
        np.testing.assert_array_equal(embeds, preprocess(noise(seed), **SETTINGS).reshape(-1, 3))
    assert cache.num_bytes == 3 * found[0].nbytes
    encoder.embed([noise(seed) for seed in range(10, 11 + MAX_BATCH)])
    assert tower.batches == [1, 2, MAX_BATCH, 1]


def test_a_prepared_picture_is_not_lost_when_the_cache_forgets_it() -> None:
    tower, cache = Tower(), ImageCache(200)  # one embedding
    encoder = make_encoder(tower, cache)
    (first,) = encoder.embed([noise(1)])
    known = encoder.prepare(noise(1))
    assert known.pixels is None
    encoder.embed([noise(2)])
    (again,) = encoder.embed([known])
    assert again is first


def test_a_picture_that_was_prepared_twice_is_encoded_once() -> None:
    tower = Tower()
    encoder = make_encoder(tower, ImageCache(10_000))
    one, other = encoder.prepare(noise(1)), encoder.prepare(noise(1))
    encoder.embed([one])
    encoder.embed([other])
    assert tower.batches == [1]


def test_nothing_is_encoded_where_one_is_no_picture() -> None:
    tower = Tower()
    with pytest.raises(UserError, match="no picture"):
        make_encoder(tower, ImageCache(10_000)).embed([noise(1), "nowhere.png"])
    assert tower.batches == []
