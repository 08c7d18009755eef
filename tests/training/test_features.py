"""training/features.py: encoded once, continued where it stopped, never taken for another set's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import make_model
from minigpt4_jax.training.features import encode_features, fingerprint

COUNT, BATCH = 10, 4


def pixels(path: Path) -> np.ndarray:
    """A picture made of the file's number."""
    number = int(path.read_text())
    return np.random.default_rng(number).normal(size=(28, 28, 3)).astype(np.float32)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [folder / f"{i}.jpg" for i in range(COUNT)]
    for number, file in enumerate(files):
        file.write_text(str(number))
    return files


@pytest.fixture
def encode(tmp_path: Path, tiny_config: ModelConfig, tiny_params: Any) -> Callable[..., Any]:
    model = make_model(tiny_config, layout=DISK, dtype=jnp.float32)

    def call(paths: list[Path], preprocess: Any = pixels, folder: str = "cache") -> Any:
        advanced: list[int] = []
        features = encode_features(
            paths,
            folder=tmp_path / folder,
            key=fingerprint(paths, tiny_params, preprocessing="p"),
            model=model,
            params=tiny_params,
            preprocess=preprocess,
            batch_size=BATCH,
            advance=advanced.append,
        )
        assert sum(advanced) == len(paths)
        return features

    return call


def test_features_are_what_the_model_says_without_the_class_token(
    encode: Any, paths: list[Path], tiny_config: ModelConfig, tiny_params: Any
) -> None:
    features = encode(paths)
    model = make_model(tiny_config, layout=DISK, dtype=jnp.float32)
    images = np.stack([pixels(path) for path in paths])
    expected, _ = jax.jit(
        lambda params, x: model.apply({"params": params}, x, method="encode_vision")
    )(tiny_params, images)
    assert features.dtype == np.float16
    assert features.shape == (COUNT, tiny_config.vit.num_patches, tiny_config.vit.width)
    # float16 keeps 11 bits of a value.
    np.testing.assert_allclose(
        np.asarray(features, np.float32), expected[:, 1:], rtol=2**-10, atol=1e-4
    )


def test_a_second_call_reads_and_encodes_nothing(encode: Any, paths: list[Path]) -> None:
    first = np.array(encode(paths))

    def must_not_run(path: Path) -> np.ndarray:
        raise AssertionError(f"{path} was encoded again")

    np.testing.assert_array_equal(encode(paths, must_not_run), first)


def test_an_interrupted_encoding_continues_where_it_stopped(
    encode: Any, paths: list[Path], tmp_path: Path
) -> None:
    whole = np.array(encode(paths, folder="uninterrupted"))
    opened: list[str] = []

    def until_seven(path: Path) -> np.ndarray:
        if len(opened) == 7:
            raise KeyboardInterrupt
        opened.append(path.stem)
        return pixels(path)

    with pytest.raises(KeyboardInterrupt):
        encode(paths, until_seven)
    assert not [f for f in (tmp_path / "cache").glob("*.npy") if "partial" not in f.name]

    def note(path: Path) -> np.ndarray:
        opened.append(path.stem)
        return pixels(path)

    opened.clear()
    continued = encode(paths, note)
    assert opened == [str(i) for i in range(BATCH, COUNT)]  # the first batch was kept
    np.testing.assert_array_equal(continued, whole)
    assert [f.suffix for f in (tmp_path / "cache").iterdir()] == [".npy"]


def test_the_key_changes_with_what_features_depend_on_and_nothing_else(
    paths: list[Path], tiny_params: Any
) -> None:
    key = fingerprint(paths, tiny_params, preprocessing="p")
    assert fingerprint(list(paths), jax.tree.map(np.array, tiny_params), preprocessing="p") == key
    other_head = {**tiny_params, "llama_proj": {"kernel": np.zeros(3)}}
    assert fingerprint(paths, other_head, preprocessing="p") == key

    assert fingerprint(paths, tiny_params, preprocessing="q") != key
    assert fingerprint(paths[::-1], tiny_params, preprocessing="p") != key
    assert fingerprint(paths[:-1], tiny_params, preprocessing="p") != key
    for part in ("vit", "ln_vision"):
        bumped = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(1e-3), tiny_params[part])
        other = {**tiny_params, part: bumped}
        assert fingerprint(paths, other, preprocessing="p") != key
    paths[3].write_text("99")
    assert fingerprint(paths, tiny_params, preprocessing="p") != key


def test_a_changed_picture_is_encoded_again(encode: Any, paths: list[Path]) -> None:
    before = np.array(encode(paths))
    paths[3].write_text("99")
    after = np.array(encode(paths))
    assert (after[3] != before[3]).any()
    np.testing.assert_array_equal(np.delete(after, 3, axis=0), np.delete(before, 3, axis=0))


def test_a_finished_file_of_another_shape_is_refused_by_name(
    encode: Any, paths: list[Path], tmp_path: Path
) -> None:
    encode(paths)
    (file,) = (tmp_path / "cache").glob("*.npy")
    np.save(file, np.zeros((2, 2), np.float16))
    with pytest.raises(UserError, match=rf"{file.name} has shape \(2, 2\).*Delete it"):
        encode(paths)
