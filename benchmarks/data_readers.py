"""Pictures per second and core of every source, beside `webdataset`'s own reader on the same tars in the same run.

    pip install -e ".[train,data,bench]"
    python benchmarks/data_readers.py --out benchmarks/results/data_readers.json

Two rows for each reader: `read` (the bytes of a picture and its caption) and `decode` (also decoded, resized and
normalised, by the same code for all). This project's sources are read in a shuffled order, webdataset's tars in the
order it has: a shuffle buffer of 1000 over whole shards, as the original uses it. One thread on one core; the files
come from the page cache, so that a disk's speed is not in the numbers. Readers take turns within a round; medians of
rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4_jax.data.array_records import ArrayRecordSource, write_array_records
from minigpt4_jax.data.pixels import PictureReader
from minigpt4_jax.data.sources import CcSbuAlign, Source
from minigpt4_jax.data.tar_index import read_caption
from minigpt4_jax.data.tar_shards import TarShards

SHARD = 1000
THEIRS = "webdataset"
READER = PictureReader(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
Samples = Iterator[tuple[bytes, str]]


def make_corpus(root: Path, count: int, side: int) -> None:
    """The same pictures as a folder, as tars of 1000 and as ArrayRecord files."""
    rng = np.random.default_rng(0)
    (root / "folder" / "image").mkdir(parents=True)
    (root / "tars").mkdir()
    annotations = []
    for first in range(0, count, SHARD):
        with tarfile.open(root / "tars" / f"{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(count, first + SHARD)):
                data, words = make_picture(rng, side), f"a picture of the number {number}"
                (root / "folder" / "image" / f"{number}.jpg").write_bytes(data)
                annotations.append({"image_id": number, "caption": words})
                for suffix, content in (("jpg", data), ("json", json.dumps({"caption": words}))):
                    member = content if isinstance(content, bytes) else content.encode()
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(member)
                    tar.addfile(info, io.BytesIO(member))
    (root / "folder" / "filter_cap.json").write_text(json.dumps(annotations))
    write_array_records(TarShards(root / "tars"), root / "records")


def make_picture(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG about as hard to decode as a photograph: smooth noise with some grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


def ours(source: Source, seed: int) -> Samples:
    """All samples of a source in a shuffled order."""
    for index in np.random.default_rng(seed).permutation(len(source)).tolist():
        example = source[index]
        image = example.image
        if image is None:
            image = source.read_image(example.image_row)
        yield image, example.exchanges[0].answer


def webdataset_samples(folder: Path, seed: int) -> Samples:
    """All samples by webdataset's own reader, shuffled as the original does."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    data = webdataset.WebDataset(shards, shardshuffle=False, seed=seed).shuffle(1000)
    for sample in data:
        yield sample["jpg"], read_caption(sample["json"])


def measure(samples: Samples, *, decode: bool) -> float:
    """Pictures per second."""
    count, rng = 0, np.random.default_rng(0)
    start = time.perf_counter()
    for image, _ in samples:
        if decode:
            READER(image, "a picture", rng=rng)
        count += 1
    return count / (time.perf_counter() - start)


def run(root: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians in pictures per second: reader -> row -> number."""
    sources = {
        "tars": TarShards(root / "tars"),
        "array_record": ArrayRecordSource(root / "records"),
        "folder": CcSbuAlign(root / "folder"),
    }
    readers: dict[str, Callable[[int], Samples]] = {
        name: (lambda seed, source=source: ours(source, seed)) for name, source in sources.items()
    }
    readers[THEIRS] = lambda seed: webdataset_samples(root / "tars", seed)
    rates: dict[str, dict[str, list[float]]] = {
        name: {"read": [], "decode": []} for name in readers
    }
    for number in range(-1, rounds):  # the first round fills the page cache and is not counted
        for name, reader in readers.items():
            for row in ("read", "decode"):
                rate = measure(reader(number + 1), decode=row == "decode")
                if number >= 0:
                    rates[name][row].append(rate)
    return {
        name: {row: statistics.median(values) for row, values in rows.items()}
        for name, rows in rates.items()
    }


def main() -> None:
    """Runs the benchmark; prints the rows and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256, help="of the stored pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder), args.pictures, args.side)
        medians = run(Path(folder), args.rounds)
    print(f"{'':14}{'read/s':>12}{'ratio':>8}{'decode/s':>12}{'ratio':>8}")
    for name, rows in medians.items():
        cells = "".join(
            f"{rate:12.0f}{rate / medians[THEIRS][row]:8.2f}" for row, rate in rows.items()
        )
        print(f"{name:14}{cells}")
    result = {
        "machine": platform.machine(),
        "processor": platform.processor(),
        "cores_used": 1,
        "python": platform.python_version(),
        "pictures": args.pictures,
        "side": args.side,
        "rounds": args.rounds,
        "pictures_per_s": {
            n: {r: round(v, 1) for r, v in rows.items()} for n, rows in medians.items()
        },
        "ratio_to_webdataset": {
            name: {row: round(rate / medians[THEIRS][row], 3) for row, rate in rows.items()}
            for name, rows in medians.items()
        },
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
