"""ArrayRecord files: plain ones that this project packs, and those inside data sets prepared by TensorFlow Datasets.

For: corpora on object stores and very large ones, where a record is one read; and `tfds` users. Needs the `data` extra
(array_record, tensorflow-datasets); TensorFlow itself is never imported. Not for: preparing a TFDS data set
(`tfds_builders.py`).

A plain record is the length of a JSON object in 4 bytes (little endian), the object (`name`, `exchanges`: pairs of
question or null and answer) and the picture's file. Not in the original.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt4_jax.config import UserError
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.sources import NO_CAPTION, UNREADABLE, Example, Exchange, Source

SUFFIX = ".array_record"
NEEDS = "Install the extra: pip install 'minigpt4_jax[data]'."


class ArrayRecordSource:
    """Plain ArrayRecord files, as `write_array_records` packs them.

    Args:
        path: a folder (all its `*.array_record`, in order of their names) or one file.

    Raises `UserError` when there is none, one is not an ArrayRecord file, or the library is missing.
    """

    in_memory = False

    def __init__(self, path: str | Path) -> None:
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource
        except ImportError as error:
            raise UserError(f"ArrayRecord files need array_record ({error}). {NEEDS}") from error
        where = Path(path)
        files = sorted(where.glob(f"*{SUFFIX}")) if where.is_dir() else [where]
        if not files or not all(file.is_file() for file in files):
            raise UserError(
                f"There is no ArrayRecord file at {path}; expected a folder with *{SUFFIX}."
            )
        self._files = files
        try:
            self._records = ArrayRecordDataSource([str(file) for file in files])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} cannot be read as ArrayRecord ({error}).") from error
        self.num_images = len(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._record(index)
        length = int.from_bytes(record[:4], "little")
        try:
            words = json.loads(record[4 : 4 + length])
            exchanges = tuple(Exchange(*pair) for pair in words["exchanges"])
            name = f"record {index} ({words['name']})"
        except (ValueError, KeyError, TypeError) as error:
            raise SampleFault(
                UNREADABLE,
                f"record {index} of {self._files[0].parent} is of another kind ({error}).",
            ) from error
        return Example(name, index, exchanges, record[4 + length :])

    def read_image(self, row: int) -> bytes:
        image = self[row].image
        assert image is not None
        return image

    def _record(self, index: int) -> bytes:
        try:
            return bytes(self._records[index])
        except (RuntimeError, ValueError, OSError) as error:
            raise SampleFault(UNREADABLE, f"Cannot read record {index} ({error}).") from error


def write_array_records(
    source: Source,
    folder: str | Path,
    *,
    records_per_file: int = 10_000,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Packs every readable sample of `source` into `folder/NNNNN-of-NNNNN.array_record`.

    A file that is there already is kept, so an interrupted packing goes on; half a file never has its final name.
    Samples that cannot be read are left out; pictures are copied as they are, good or bad. Returns how many samples
    were left out of the files that this call wrote.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = -(-len(source) // records_per_file)
    left_out = 0
    for number in range(files):
        done = target / f"{number:05d}-of-{files:05d}{SUFFIX}"
        beside = done.with_suffix(".partial")
        first, last = number * records_per_file, min(len(source), (number + 1) * records_per_file)
        if not done.exists():
            # One record a group: a group is decompressed as a whole, and pictures are compressed already.
            writer = ArrayRecordWriter(str(beside), "group_size:1")
            try:
                for index in range(first, last):
                    try:
                        writer.write(_pack(source, index))
                    except SampleFault:
                        left_out += 1
            finally:
                writer.close()
            os.replace(beside, done)
        progress(last, len(source))
    return left_out


def _pack(source: Source, index: int) -> bytes:
    example = source[index]
    image = example.image if example.image is not None else source.read_image(example.image_row)
    words = json.dumps({"name": example.name, "exchanges": example.exchanges}).encode()
    return len(words).to_bytes(4, "little") + words + image


class TfdsSource:
    """The `train` split of a data set that TensorFlow Datasets prepared in the ArrayRecord format.

    It must have the features `image` and `caption`, as those of `tfds_builders.py` and many of TFDS's own.

    Args:
        path: the folder of the prepared version, such as `~/tensorflow_datasets/cc_sbu_align/1.0.0`.

    Raises `UserError` when it is none, is in another file format, or lacks a feature.
    """

    in_memory = False

    def __init__(self, path: str | Path) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"A prepared data set needs tensorflow-datasets ({error}). {NEEDS}"
            ) from error
        self._path = Path(path).expanduser()
        try:
            builder = tfds.builder_from_directory(self._path)
            missing = {"image", "caption"} - set(builder.info.features)
            if missing:
                raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
            self._records = builder.as_data_source(
                split="train", decoders={"image": tfds.decode.SkipDecoding()}
            )
        except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as error:
            raise UserError(
                f"{path} cannot be used as a prepared data set ({error}). Expected the folder of a version with a "
                "train split in the array_record format, features image and caption."
            ) from error
        self.num_images = len(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        name = f"example {index}"
        try:
            record: dict[str, Any] = self._records[index]
            caption = _text(record["caption"])
        except (RuntimeError, ValueError, OSError) as error:
            raise SampleFault(
                UNREADABLE, f"Cannot read {name} of {self._path} ({error})."
            ) from error
        if "image_id" in record:
            name += f" ({_text(record['image_id'])})"
        if not caption.strip():
            raise SampleFault(NO_CAPTION, f"The caption of {name} is empty; expected text.")
        return Example(name, index, (Exchange(None, caption),), bytes(record["image"]))

    def read_image(self, row: int) -> bytes:
        image = self[row].image
        assert image is not None
        return image


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
