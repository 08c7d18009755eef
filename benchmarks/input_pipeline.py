"""The input pipeline alone: stage-1 batches from tars in pictures per second, against what one H200 takes.

    pip install -e ".[train]"
    python benchmarks/input_pipeline.py --out benchmarks/results/input_pipeline.json

Everything that `train.py` does before a batch reaches a device, and nothing behind it: captions and JPEGs from two
sources of webdataset tars in the original's ratio and a shuffled order, the random crop, resize and normalisation to
224 pixels, `blip_caption`, tokens, batches of 256 in length buckets. The tars are made here (smooth noise with some
grain, about as hard to decode as a photograph) and lie in the page cache: a disk's or a network's speed is not in the
numbers. Settings take turns within a round; medians of rounds. `words` reads no picture: what a process does for the
rows of others.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
import tokenizers
from data_readers import make_picture

from minigpt4_jax.data.captions import blip_caption
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.pipeline import make_pipeline
from minigpt4_jax.data.pixels import PictureReader
from minigpt4_jax.data.prompts import VICUNA_V0
from minigpt4_jax.data.tar_shards import TarShards
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.presets import CLIP_MEAN, CLIP_STD

H200_TAKES = 350
"""Pictures per second in stage 1: the most that one H200 is expected to train on. What is asked of the pipeline."""
BUCKETS = (44, 48, 52, 65)
MAX_TEXT_LEN, IMAGE_TOKENS = 32, 32
SHARD = 500
SOURCES = {"laion": 115, "cc_sbu": 14}
READER = PictureReader(size=224, mean=CLIP_MEAN, std=CLIP_STD, random_resized_crop=True)


class Setting(NamedTuple):
    """A row: JPEGs of `side` pixels (0: words alone), made to batches by so many threads."""

    side: int
    threads: int

    @property
    def name(self) -> str:
        return f"jpeg_{self.side}_threads_{self.threads}" if self.side else "words"

    @property
    def what(self) -> str:
        many = f"{self.threads} thread" + "s" * (self.threads > 1)
        return (
            f"JPEGs of {self.side} pixels, {many}" if self.side else f"words of a row alone, {many}"
        )


def make_captions(count: int) -> list[str]:
    """As long as the filtered web captions are: 14 words on average, 4 either way."""
    rng = np.random.default_rng(1)
    alphabet = np.asarray(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(alphabet, rng.integers(2, 9))) for _ in range(2000)]
    lengths = np.clip(rng.normal(14, 4, count).round(), 3, 30).astype(int)
    return [" ".join(rng.choice(vocabulary, length)) for length in lengths]


def make_tars(root: Path, captions: Sequence[str], side: int) -> None:
    """One picture per caption, as a folder of tars for each source."""
    rng = np.random.default_rng(side)
    last = len(captions) * SOURCES["laion"] // sum(SOURCES.values())
    for name, places in (("laion", range(last)), ("cc_sbu", range(last, len(captions)))):
        (root / name).mkdir(parents=True)
        for first in range(places.start, places.stop, SHARD):
            with tarfile.open(root / name / f"{first:06d}.tar", "w") as tar:
                for number in range(first, min(places.stop, first + SHARD)):
                    caption = json.dumps({"caption": captions[number]}).encode()
                    for kind, data in (("jpg", make_picture(rng, side)), ("json", caption)):
                        info = tarfile.TarInfo(f"{number:09d}.{kind}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))


def make_tokenizer(captions: Sequence[str]) -> Tokenizer:
    """Byte-pair pieces learnt from the captions: a word is about a token, as with LLaMA's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    control = [tokenizers.AddedToken(name, special=True) for name in ("<s>", "</s>")]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=control,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def measure(
    root: Path, setting: Setting, tokenizer: Tokenizer, *, batch_size: int, batches: int, seed: int
) -> dict[str, float]:
    """Pictures per second, per second of CPU time, and real tokens of all that are padded, over some batches."""
    parts = [
        Part(name, TarShards(root / name), float(weight), blip_caption)
        for name, weight in SOURCES.items()
    ]
    encoder = Encoder(
        VICUNA_V0,
        tokenizer,
        prompts=(None,),
        num_image_tokens=IMAGE_TOKENS,
        max_text_len=MAX_TEXT_LEN,
        end_symbol=("\n",),
        truncate=True,
    )
    with make_pipeline(
        parts,
        encoder,
        seed=seed,
        batch_size=batch_size,
        length_multiple=8,
        length_buckets=BUCKETS,
        bucket_window=8,
        max_corrupt_share=0.0,
        pictures=READER if setting.side else None,
        num_threads=setting.threads,
    ) as stream:
        # As many batches as are made side by side are begun before the clock, as many are at its end.
        list(islice(stream, setting.threads))
        start, cpu = time.perf_counter(), time.process_time()
        masks = [batch["attention_mask"] for batch in islice(stream, batches)]
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rows = sum(len(mask) for mask in masks)
    real = sum(int(mask.sum()) for mask in masks)
    return {
        "images_per_s": rows / seconds,
        "images_per_cpu_s": rows / cpu,
        "padding_efficiency": real / sum(mask.size for mask in masks),
    }


def run(
    settings: Sequence[Setting],
    *,
    pictures: int,
    rounds: int,
    batch_size: int,
    batches: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The rows of the JSON, by name."""
    captions = make_captions(pictures)
    tokenizer = make_tokenizer(captions)
    found: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        sides = sorted({setting.side for setting in settings} - {0})
        for side in sides:
            make_tars(Path(folder) / str(side), captions, side)
        for number in range(-1, rounds):  # the first round fills the page cache and is not counted
            for setting in settings:
                numbers = measure(
                    Path(folder) / str(setting.side or sides[0]),
                    setting,
                    tokenizer,
                    batch_size=batch_size,
                    batches=batches,
                    seed=number + 1,
                )
                if number >= 0:
                    found[setting].append(numbers)
                    say(f"{setting.what}: {numbers['images_per_s']:.0f}/s")
    return {setting.name: summary(setting, rows) for setting, rows in found.items()}


def summary(setting: Setting, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The row of a setting, from its rounds."""
    rates = [one["images_per_s"] for one in rounds]
    middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {
        "what": setting.what,
        "side": setting.side,
        "threads": setting.threads,
        "images_per_s": round(middle["images_per_s"], 1),
        "images_per_s_of_rounds": [round(min(rates), 1), round(max(rates), 1)],
        "images_per_cpu_s": round(middle["images_per_cpu_s"], 1),
        "of_h200": round(middle["images_per_s"] / H200_TAKES, 3),
        "padding_efficiency": round(middle["padding_efficiency"], 4),
        "rounds": len(rates),
        "load_after": round(os.getloadavg()[0], 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; prints the rows and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=4000, help="of each size")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 512], help="in pixels")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8, help="in a setting's turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    head = {
        "hardware": measuring.hardware()
        | {name: version(name) for name in ("grain", "pillow", "tokenizers")},
        "h200_takes": H200_TAKES,
        "pictures": args.pictures,
        "batch_size": args.batch_size,
        "batches": args.batches,
    }
    settings = [Setting(side, threads) for side in args.sides for threads in args.threads]
    settings.append(Setting(0, 1))
    results = measuring.Results(args.out, head)
    rows = run(
        settings,
        pictures=args.pictures,
        rounds=args.rounds,
        batch_size=args.batch_size,
        batches=args.batches,
        say=lambda line: print(line, flush=True),
    )
    for name, row in rows.items():
        results.add(name, row, order=list(rows))
        print(f"{row['what']:32}{row['images_per_s']:10.0f} /s{row['of_h200']:8.2f} H200")


if __name__ == "__main__":
    main()
