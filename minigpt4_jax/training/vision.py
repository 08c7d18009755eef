"""Where a batch's vision features come from: the cache, or the frozen tower inside the loop.

For: the choice that `cache_features` makes, behind one method. Not for: the cache's files (`features.py`), the
gradient (`step.py`; the tower is frozen and compiled apart from the step, so that it has none).

The tower is on the devices only while it is needed: for a cache, on the first one until all pictures are encoded; in
the loop whole on every device, each with its rows of the batch.

Differs from the original, which always encodes in the step. The cache keeps float16, so the two ways differ by its
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Float

from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.pixels import PictureReader
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import make_model
from minigpt4_jax.presets import Preset
from minigpt4_jax.sharding import replicated
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.features import (
    Encoded,
    Features,
    encode_features,
    fingerprint,
    make_picture_encoder,
)
from minigpt4_jax.training.frozen import FrozenWeights
from minigpt4_jax.training.metrics import make_progress
from minigpt4_jax.training.placement import place_rows

FEATURE_BATCH = 16


class CachedVision:
    """Rows of the feature cache."""

    pictures: PictureReader | None = None
    """What decodes pictures in the pipeline: it need not."""

    def __init__(self, encoded: Encoded, *, mesh: Mesh) -> None:
        self.features: Features = encoded.features
        self._mesh = mesh
        self.bad_images = encoded.faults
        """Pictures known to be broken, by `image_index`."""

    def features_of(self, batch: Batch) -> Float[Array, "B R C"]:
        """Of the batch's pictures, as `MiniGPT4.encode_vision` makes them; float32, on the mesh as the batch's rows."""
        rows = np.asarray(self.features[batch["image_index"]], np.float32)
        placed: jax.Array = place_rows(rows, self._mesh)
        return placed


class PixelVision:
    """The frozen tower, and the Q-Former if there is one, on the batch's pixels."""

    def __init__(
        self,
        preset: Preset,
        frozen: FrozenWeights,
        *,
        mesh: Mesh,
        dtype: Any,
        pictures: PictureReader,
    ) -> None:
        self.pictures: PictureReader | None = pictures
        self.bad_images: dict[int, SampleFault] = {}  # found by the pipeline, sample by sample
        self._encode = make_picture_encoder(make_model(preset.model, layout=DISK, dtype=dtype))
        self._mesh = mesh
        self._params = frozen.load(
            preset.model.vision_parts, layout=DISK, dtype=dtype, place=lambda _: replicated(mesh)
        )

    def features_of(self, batch: Batch) -> Float[Array, "B R C"]:
        """As `CachedVision.features_of`."""
        pixels = place_rows(batch["pixels"], self._mesh)
        return self._encode(self._params, pixels).astype(jnp.float32)


Vision = CachedVision | PixelVision


def make_vision(
    config: TrainConfig,
    preset: Preset,
    parts: Sequence[Part],
    frozen: FrozenWeights,
    *,
    mesh: Mesh,
    dtype: Any,
) -> Vision:
    """As `config.cache_features` says. `dtype` is that of the tower in the loop; a cache is encoded in float32."""
    pictures = make_reader(config, preset)
    if config.cache_features:
        encoded = prepare_features(config, preset, parts, frozen, pictures=pictures)
        return CachedVision(encoded, mesh=mesh)
    return PixelVision(preset, frozen, mesh=mesh, dtype=dtype, pictures=pictures)


def make_reader(config: TrainConfig, preset: Preset) -> PictureReader:
    """What decodes and preprocesses a picture of the run."""
    return PictureReader(
        size=preset.model.vit.image_size,
        mean=preset.image_mean,
        std=preset.image_std,
        random_resized_crop=config.data.random_resized_crop,
    )


def prepare_features(
    config: TrainConfig,
    preset: Preset,
    parts: Sequence[Part],
    frozen: FrozenWeights,
    *,
    pictures: PictureReader,
) -> Encoded:
    """Features of every picture of every source, numbered through in the order of `parts`."""
    places = [(part, row) for part in parts for row in range(part.source.num_images)]
    # float32 products are of less precision on accelerators than on a CPU.
    precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  (jax's types do not name its settings)
    described = (
        f"square bicubic {pictures.size} {pictures.mean} {pictures.std}; float32 on {jax.default_backend()}, precision "
        f"{precision}, kept as float16"
    )
    key = fingerprint(
        _files(places), frozen.fingerprints(), config=preset.model, preprocessing=described
    )
    first = SingleDeviceSharding(jax.local_devices()[0])
    unused = np.random.default_rng(0)  # a cached picture is never cropped

    def preprocess(number: int) -> np.ndarray:
        part, row = places[number]
        return pictures(part.source.read_image(row), f"picture {row}", rng=unused)

    with make_progress() as progress:
        task = progress.add_task("encoding pictures", total=len(places), numbers="")
        return encode_features(
            len(places),
            folder=Path(config.feature_cache or Path(config.workdir) / "features"),
            key=key,
            model=make_model(preset.model, layout=DISK, dtype=jnp.float32),
            load_params=lambda: frozen.load(
                preset.model.vision_parts, layout=DISK, dtype=jnp.float32, place=lambda _: first
            ),
            preprocess=preprocess,
            batch_size=FEATURE_BATCH,
            advance=lambda count: progress.advance(task, count),
        )


def _files(places: Sequence[tuple[Part, int]]) -> Iterator[bytes]:
    for part, row in places:
        yield part.source.read_image(row)
