"""training/features.py: encoded once, continued where it stopped, never taken for another set's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import make_model
from minigpt4_jax.training.features import encode_features, fingerprint
from minigpt4_jax.training.frozen import hash_tree

COUNT, BATCH = 10, 4


def pixels(image: bytes) -> np.ndarray:
    """A picture made of the number that stands for its file."""
    number = int(image)
    return np.random.default_rng(number).normal(size=(28, 28, 3)).astype(np.float32)


def sums(params: Any) -> dict[str, str]:
    return {part: hash_tree(tree) for part, tree in params.items()}


@pytest.fixture
def images() -> list[bytes]:
    return [str(number).encode() for number in range(COUNT)]


@pytest.fixture
def encode(tmp_path: Path, any_config: ModelConfig, any_params: Any) -> Callable[..., Any]:
    model = make_model(any_config, layout=DISK, dtype=jnp.float32)

    def load() -> Any:
        return {name: any_params[name] for name in any_config.vision_parts}

    def call(
        images: list[bytes],
        preprocess: Any = pixels,
        folder: str = "cache",
        load_params: Any = load,
    ) -> Any:
        advanced: list[int] = []
        encoded = encode_features(
            len(images),
            folder=tmp_path / folder,
            key=fingerprint(images, sums(any_params), config=any_config, preprocessing="p"),
            model=model,
            load_params=load_params,
            preprocess=lambda row: preprocess(images[row]),
            batch_size=BATCH,
            advance=advanced.append,
        )
        assert sum(advanced) == len(images)
        return encoded

    return call


def test_features_are_what_the_projection_reads(
    encode: Any, images: list[bytes], any_config: ModelConfig, any_params: Any
) -> None:
    features = encode(images).features
    model = make_model(any_config, layout=DISK, dtype=jnp.float32)
    images = np.stack([pixels(image) for image in images])
    expected, _ = jax.jit(
        lambda params, x: model.apply({"params": params}, x, method="encode_vision")
    )(any_params, images)
    assert features.dtype == np.float16
    assert features.shape == (COUNT, *any_config.feature_shape)
    # float16 keeps 11 bits of a value.
    np.testing.assert_allclose(np.asarray(features, np.float32), expected, rtol=2**-10, atol=1e-4)


def test_a_second_call_loads_no_tower_and_encodes_nothing(encode: Any, images: list[bytes]) -> None:
    first = np.array(encode(images).features)

    def must_not_run(image: bytes) -> np.ndarray:
        raise AssertionError(f"{image!r} was encoded again")

    def must_not_load() -> Any:
        raise AssertionError("the tower was loaded for nothing")

    again = encode(images, must_not_run, load_params=must_not_load)
    np.testing.assert_array_equal(again.features, first)


def test_an_interrupted_encoding_continues_where_it_stopped(
    encode: Any, images: list[bytes], tmp_path: Path
) -> None:
    whole = np.array(encode(images, folder="uninterrupted").features)
    opened: list[str] = []

    def until_seven(image: bytes) -> np.ndarray:
        if len(opened) == 7:
            raise KeyboardInterrupt
        opened.append(image.decode())
        return pixels(image)

    with pytest.raises(KeyboardInterrupt):
        encode(images, until_seven)
    assert not [f for f in (tmp_path / "cache").glob("*.npy") if "partial" not in f.name]

    def note(image: bytes) -> np.ndarray:
        opened.append(image.decode())
        return pixels(image)

    opened.clear()
    continued = encode(images, note).features
    assert opened == [str(i) for i in range(BATCH, COUNT)]  # the first batch was kept
    np.testing.assert_array_equal(continued, whole)
    assert [f.suffix for f in (tmp_path / "cache").iterdir()] == [".npy"]


def test_the_key_changes_with_what_features_depend_on_and_nothing_else(
    images: list[bytes], any_params: Any, any_config: ModelConfig
) -> None:
    def key_of(images: Iterable[bytes], params: Any, *, preprocessing: str = "p") -> str:
        return fingerprint(images, sums(params), config=any_config, preprocessing=preprocessing)

    key = key_of(images, any_params)
    assert key_of(iter(images), jax.tree.map(np.array, any_params)) == key
    other_head = {**any_params, "llama_proj": {"kernel": np.zeros(3)}}
    assert key_of(images, other_head) == key

    assert key_of(images, any_params, preprocessing="q") != key
    assert key_of(images[::-1], any_params) != key
    assert key_of(images[:-1], any_params) != key
    for part in set(any_params) - {"llama", "llama_proj"}:
        bumped = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(1e-3), any_params[part])
        other = {**any_params, part: bumped}
        assert key_of(images, other) != key, part
    images[3] = b"99"
    assert key_of(images, any_params) != key


def test_a_changed_picture_is_encoded_again(encode: Any, images: list[bytes]) -> None:
    before = np.array(encode(images).features)
    images[3] = b"99"
    after = np.array(encode(images).features)
    assert (after[3] != before[3]).any()
    np.testing.assert_array_equal(np.delete(after, 3, axis=0), np.delete(before, 3, axis=0))


def test_a_finished_file_of_another_shape_is_refused_by_name(
    encode: Any, images: list[bytes], tmp_path: Path
) -> None:
    encode(images)
    (file,) = (tmp_path / "cache").glob("*.npy")
    np.save(file, np.zeros((2, 2), np.float16))
    with pytest.raises(UserError, match=rf"{file.name} has shape \(2, 2\).*Delete it"):
        encode(images)


def test_a_picture_that_cannot_be_decoded_is_noted_and_stays_noted(
    encode: Any, images: list[bytes], tmp_path: Path
) -> None:
    def broken(image: bytes) -> np.ndarray:
        if image in (b"2", b"7"):
            raise SampleFault("damaged image", f"picture {image.decode()} is bad")
        return pixels(image)

    def stop_at_eight(image: bytes) -> np.ndarray:
        if image == b"8":
            raise KeyboardInterrupt
        return broken(image)

    good = encode(images, folder="good")
    assert good.faults == {}
    with pytest.raises(KeyboardInterrupt):
        encode(images, stop_at_eight)
    for encoded in (encode(images, broken), encode(images)):  # continued, then read
        assert {row: (fault.reason, str(fault)) for row, fault in encoded.faults.items()} == {
            2: ("damaged image", "picture 2 is bad"),
            7: ("damaged image", "picture 7 is bad"),
        }
        np.testing.assert_array_equal(
            np.delete(encoded.features, [2, 7], axis=0), np.delete(good.features, [2, 7], axis=0)
        )
        assert not encoded.features[[2, 7]].any()


def test_features_of_another_precision_are_not_used(run: Any, tmp_path: Path) -> None:
    cache, short = tmp_path / "f", ("optimizer.max_steps=1", "optimizer.warmup_steps=0")
    run(tmp_path / "a", f"feature_cache={cache}", *short)
    run(tmp_path / "b", f"feature_cache={cache}", *short)
    assert len(list(cache.glob("*.npy"))) == 1
    before = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  (jax's types do not name its settings)
    jax.config.update("jax_default_matmul_precision", "high")
    try:
        run(tmp_path / "c", f"feature_cache={cache}", *short)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert len(list(cache.glob("*.npy"))) == 2
