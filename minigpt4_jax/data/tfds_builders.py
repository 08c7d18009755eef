"""TensorFlow Datasets builders for captioned pictures, which prepare and read without TensorFlow.

For: `prepare("cc_sbu_align" | "image_caption_tars", folder, data_dir)`, after which `tfds.data_source` and
`tfds.builder_from_directory(...).as_data_source` serve the data set to anybody. The files are ArrayRecord: TFDS's
default, TFRecord, cannot be written or read without TensorFlow. Not for: training (`array_records.TfdsSource` reads
what is prepared here).

The library is imported, and the builders are defined, only when they are asked for. Not in the original.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.config import UserError
from minigpt4_jax.data.array_records import NEEDS
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.sources import CcSbuAlign, Source
from minigpt4_jax.data.tar_shards import TarShards

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

NAMES = ("cc_sbu_align", "image_caption_tars")


def prepare(name: str, folder: str | Path, data_dir: str | Path) -> Path:
    """Prepares a folder of files as a data set under `data_dir`. Returns the folder of the version, ready to read.

    Args:
        name: `cc_sbu_align` for a folder with `filter_cap.json` and `image/`, `image_caption_tars` for one with
            webdataset tars.

    Raises `UserError` for another name, a broken folder, or without tensorflow-datasets.
    """
    if name not in NAMES:
        raise UserError(f"There is no builder {name!r}; expected one of {', '.join(NAMES)}.")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"Preparing needs tensorflow-datasets ({error}). {NEEDS}") from error
    builder = builders()[name](data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(folder))
    )
    return Path(builder.data_dir)


@functools.cache
def builders() -> dict[str, type[tfds.core.GeneratorBasedBuilder]]:
    """The builder classes by name. Their source folder is TFDS's `manual_dir`."""
    import tensorflow_datasets as tfds

    class CaptionBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc,call-arg]
        """Pictures with one caption each."""

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
            for index in range(len(source)):
                try:
                    example = source[index]
                    image = source.read_image(example.image_row)
                except SampleFault:
                    continue  # the index report names them; a file that vanished meanwhile is no sample
                record = {
                    "image_id": example.name,
                    "image": image,
                    "caption": example.exchanges[0].answer,
                }
                yield index, record

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
