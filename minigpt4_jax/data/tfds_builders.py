"""TensorFlow Datasets builders for captioned pictures, which prepare and read without TensorFlow.

For: `prepare("cc_sbu_align" | "image_caption_tars", folder, data_dir)`, after which `tfds.data_source` and
`tfds.builder_from_directory(...).as_data_source` serve the data set to anybody. The files are ArrayRecord: TFDS's
default, TFRecord, cannot be written or read without TensorFlow. A sample that cannot be read is left out, counted and
named; past a set share nothing is prepared. Not for: training (`array_records.TfdsSource` reads what is prepared here).

The library is imported, and the builders are defined, only when they are asked for. Not in the original.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.config import UserError
from minigpt4_jax.data.array_records import NEEDS
from minigpt4_jax.data.datasets import require_intact
from minigpt4_jax.data.faults import Fault, FaultCount, SampleFault, describe
from minigpt4_jax.data.sources import CcSbuAlign, Source
from minigpt4_jax.data.tar_shards import TarShards
from minigpt4_jax.train_config import DataConfig

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

logger = logging.getLogger(__name__)

NAMES = ("cc_sbu_align", "image_caption_tars")


def prepare(
    name: str,
    folder: str | Path,
    data_dir: str | Path,
    *,
    max_corrupt_share: float = DataConfig.max_corrupt_share,
) -> Path:
    """Prepares a folder of files as a data set under `data_dir`. Returns the folder of the version, ready to read.

    Args:
        name: `cc_sbu_align` for a folder with `filter_cap.json` and `image/`, `image_caption_tars` for one with
            webdataset tars.
        max_corrupt_share: 0 to 1; so much of the folder may be left out because it cannot be read.

    Raises `UserError` for another name, a broken folder, more left out than that, or without tensorflow-datasets.
    """
    if name not in NAMES:
        raise UserError(f"There is no builder {name!r}; expected one of {', '.join(NAMES)}.")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"Preparing needs tensorflow-datasets ({error}). {NEEDS}") from error
    builder = builders()[name](data_dir=str(data_dir), file_format="array_record")
    builder.max_corrupt_share = max_corrupt_share
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(folder))
    )
    return Path(builder.data_dir)


@functools.cache
def builders() -> dict[str, type[tfds.core.GeneratorBasedBuilder]]:
    """The builder classes by name. Their source folder is TFDS's `manual_dir`."""
    import tensorflow_datasets as tfds

    # The library has no types: to mypy the base is Any, and its keyword unknown.
    class CaptionBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc,call-arg]
        """Pictures with one caption each."""

        max_corrupt_share = DataConfig.max_corrupt_share

        VERSION = tfds.core.Version("1.0.0")
        MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the folder of the pictures and captions."

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict(
                {
                    "image_id": tfds.features.Text(),
                    "image": tfds.features.Image(),
                    "caption": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=("image", "caption")
            )

        def open(self, folder: Path) -> Source:
            raise NotImplementedError

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(self.open(Path(dl_manager.manual_dir)))}

        def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
            limit: Any = {"max_share": self.max_corrupt_share, "setting": "max_corrupt_share"}
            require_intact(self.name, source, **limit)
            left_out = FaultCount(self.name, len(source), **limit)
            for index in range(len(source)):
                try:
                    example = source[index]
                    image = source.read_image(example.image_row)
                except SampleFault as fault:
                    left_out.add(1, [Fault(index, fault.reason, str(fault))])
                    continue
                left_out.add(1, [])
                record = {
                    "image_id": example.name,
                    "image": image,
                    "caption": example.exchanges[0].answer,
                }
                yield index, record
            if left_out.counts():
                logger.warning("Left out of %r: %s", self.name, describe(left_out.counts()))

    class CcSbuAlignBuilder(CaptionBuilder):
        """The original's stage-2 folder."""

        name = "cc_sbu_align"

        def open(self, folder: Path) -> Source:
            return CcSbuAlign(folder)

    class ImageCaptionTars(CaptionBuilder):
        """Webdataset tars."""

        name = "image_caption_tars"

        def open(self, folder: Path) -> Source:
            return TarShards(folder)

    return {builder.name: builder for builder in (CcSbuAlignBuilder, ImageCaptionTars)}
