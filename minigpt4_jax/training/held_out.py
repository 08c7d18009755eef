"""Samples that a run never trains on, looked at while it goes on: their mean loss, and what the model says of a few.

For: which samples, their loss, when to look. Not for: writing captions (a callback of the entry point: training and
generation never import each other), keeping them (`captions.py`), the arithmetic (`step.py`).

The same samples with the same prompts every time, seen without a crop, so that two numbers differ by the projection
alone. Differs from the original, which has no held-out samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch, ExampleTokens, collate
from minigpt4_jax.data.datasets import Part, open_sources
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.pixels import PictureReader, open_picture
from minigpt4_jax.data.sources import Example
from minigpt4_jax.models.minigpt4 import MiniGPT4
from minigpt4_jax.presets import Preset
from minigpt4_jax.train_config import HeldOutConfig, TrainConfig
from minigpt4_jax.training.captions import Caption, Captions, Shown
from minigpt4_jax.training.frozen import FrozenWeights
from minigpt4_jax.training.identity import run_prompts
from minigpt4_jax.training.loss import target_losses
from minigpt4_jax.training.metrics import Metrics
from minigpt4_jax.training.placement import batch_share
from minigpt4_jax.training.state import Projection, TrainBatch
from minigpt4_jax.training.step import Frozen, answer_logits
from minigpt4_jax.training.together import first_process_first, from_first
from minigpt4_jax.training.vision import CachedVision, Vision, make_reader, make_vision

LossSum = tuple[Float[Array, ""], Int[Array, ""]]
"""Summed loss of a batch's targets, and their number."""
Evaluate = Callable[[Projection, Batch, Vision], LossSum]
"""The compiled loss of a batch, whose pictures the `Vision` has the features of."""


def open_held_out(
    config: TrainConfig,
    preset: Preset,
    frozen: FrozenWeights,
    *,
    encoder: Callable[[], Encoder],
    vision: Vision,
    mesh: Mesh,
    dtype: Any,
    evaluate: Evaluate,
    caption: Caption | None,
) -> HeldOut | None:
    """What `config.held_out` names, ready to be looked at; None where it names nothing.

    Args:
        frozen: the frozen parameters, for features of the pictures.
        encoder: makes that of the run: the same template, prompts and limits.
        vision: that of the run; where it encodes pictures in the loop, these too.
        caption: see `captions.Caption`; None: no captions.

    Raises:
        UserError: a folder that cannot be used, or one that the run trains on.
    """
    held_out, data = config.held_out, config.data
    sources = held_out.all_sources()
    if not sources:
        return None
    trained = {(s.kind, Path(s.path).resolve()) for s in data.all_sources().values()}
    for source in sources.values():
        if (source.kind, Path(source.path).resolve()) in trained:
            raise UserError(
                f"held_out names {source.path}, on which the run trains; expected samples that it never sees. Put some "
                "of them into a set of their own."
            )
    # A crop would make two looks differ by chance.
    data = dataclasses.replace(data, folder="", sources=sources, random_resized_crop=False)
    with first_process_first("held-out data"):
        parts = open_sources(data)
    picked = pick_samples(
        parts,
        encoder(),
        prompts=run_prompts(data) or (None,),
        max_samples=held_out.max_samples,
    )
    seen = dataclasses.replace(config, data=data)
    if isinstance(vision, CachedVision):
        with first_process_first("held-out features"):
            vision = make_vision(seen, preset, [picked.part], frozen, mesh=mesh, dtype=dtype)
    pictures = None if isinstance(vision, CachedVision) else make_reader(seen, preset)
    captions = None
    if caption is not None and held_out.captions:
        shown = pick_pictures(picked, held_out.captions)
        captions = Captions(Path(config.workdir), shown, caption)
    return HeldOut(
        held_out,
        max_steps=config.optimizer.max_steps,
        num_samples=len(picked.tokens),
        batches=make_held_out_batches(
            picked,
            batch_size=data.batch_size,
            length_multiple=data.length_multiple,
            pictures=pictures,
            share=batch_share(mesh),
        ),
        evaluate=lambda projection, batch: evaluate(projection, batch, vision),
        captions=captions,
    )


def make_eval_step(model: MiniGPT4) -> Callable[[Projection, Frozen, TrainBatch], LossSum]:
    """`eval_step(projection, frozen, batch)`; to be jitted by the loop, with nothing donated."""

    def eval_step(projection: Projection, frozen: Frozen, batch: TrainBatch) -> LossSum:
        logits, _ = answer_logits(projection, frozen, batch, model=model)
        losses = target_losses(logits, batch.target_ids, batch.target_mask)
        return jnp.sum(losses), jnp.sum(batch.target_mask)

    return eval_step


class Picked(NamedTuple):
    """The samples that are looked at."""

    part: Part
    """Their words and pictures as a source of their own; its pictures are numbered from 0."""
    prompts: list[str | None]
    """What each is asked."""
    tokens: list[ExampleTokens]


class _Subset:
    """Some samples of several sources, with their pictures, as one source."""

    in_memory = True

    def __init__(self, examples: Sequence[Example], places: Sequence[tuple[Part, int]]) -> None:
        self._examples, self._places = examples, places
        self.num_images = len(places)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def read_image(self, row: int) -> bytes:
        part, place = self._places[row]
        return part.source.read_image(place)


def pick_samples(
    parts: Sequence[Part], encoder: Encoder, *, prompts: Sequence[str | None], max_samples: int
) -> Picked:
    """At most `max_samples`, spread evenly over all; of each the prompt that belongs to its number.

    Samples that cannot be used are left out, and said. Raises `UserError` when none is left.
    """
    everything = [(part, index) for part in parts for index in range(len(part.source))]
    count = min(max_samples, len(everything))
    wanted = [everything[number * len(everything) // count] for number in range(count)]
    rows: dict[tuple[str, int], int] = {}
    examples, asked, tokens = [], [], []
    places: list[tuple[Part, int]] = []
    faults: list[SampleFault] = []
    for number, (part, index) in enumerate(wanted):
        choice = number % len(prompts)
        try:
            example = part.source[index]
            open_picture(example.image or part.source.read_image(example.image_row), example.name)
            tokens.append(encoder.encode(example, choice, process=part.process))
        except SampleFault as fault:
            faults.append(fault)
            continue
        key = (part.name, example.image_row)
        if key not in rows:
            rows[key] = len(places)
            places.append((part, example.image_row))
        first = example.exchanges[0]
        words = (first._replace(answer=part.process(first.answer)), *example.exchanges[1:])
        examples.append(Example(example.name, rows[key], words))
        asked.append(prompts[choice] if first.question is None else first.question)
    if faults:
        print(f"{len(faults)} held-out samples are left out. The first: {faults[0]}", flush=True)
    if not examples:
        raise UserError(
            f"None of {count} held-out samples can be used. The first: {faults[0]} Mend the files, or name others in "
            "held_out."
        )
    return Picked(Part("held_out", _Subset(examples, places)), asked, tokens)


def pick_pictures(picked: Picked, count: int) -> list[Shown]:
    """At most `count` different pictures, spread evenly, with the first thing that is asked about each."""
    source = picked.part.source
    first = {source[number].image_row: number for number in reversed(range(len(source)))}
    numbers = sorted(first.values())
    count = min(count, len(numbers))
    shown = []
    for number in (numbers[place * len(numbers) // count] for place in range(count)):
        example = source[number]
        data = source.read_image(example.image_row)
        answer = example.exchanges[0].answer
        shown.append(Shown(example.name, data, picked.prompts[number], answer))
    return shown


def make_held_out_batches(
    picked: Picked,
    *,
    batch_size: int,
    length_multiple: int,
    pictures: PictureReader | None,
    share: tuple[int, int] = (0, 1),
) -> Callable[[], list[Batch]]:
    """The samples in batches of one shape; rows that fill the last one up have no targets.

    Args:
        batch_size: rows over all processes; each process gets its share of them.
        pictures: decodes the pictures into `Batch["pixels"]`; None leaves them to the feature cache.
        share: which part of a batch this process makes, and of how many.
    """
    source, size = picked.part.source, len(picked.tokens)
    filled = -(-size // batch_size) * batch_size
    kept = [min(row, size - 1) for row in range(filled)]
    whole = collate(
        [picked.tokens[row] for row in kept],
        [source[row].image_row for row in kept],
        length_multiple=length_multiple,
    )
    whole["target_mask"][size:] = False
    arrays = cast(dict[str, np.ndarray], whole)
    rng = np.random.default_rng(0)  # a held-out picture is never cropped

    def make_batch(first: int) -> Batch:
        own = batch_size // share[1]
        rows = slice(first + own * share[0], first + own * (share[0] + 1))
        batch = cast(Batch, {name: array[rows] for name, array in arrays.items()})
        if pictures is not None:
            read = {row: source.read_image(row) for row in set(batch["image_index"].tolist())}
            seen = {row: pictures(data, f"picture {row}", rng=rng) for row, data in read.items()}
            batch["pixels"] = np.stack([seen[row] for row in batch["image_index"].tolist()])
        return batch

    return lambda: [make_batch(first) for first in range(0, filled, batch_size)]


class HeldOut:
    """Looks at the held-out samples every so many steps, and at the end.

    Args:
        batches: gives the same batches every time.
        evaluate: the loss of one.
        captions: of a few pictures; None: none.
    """

    def __init__(
        self,
        config: HeldOutConfig,
        *,
        max_steps: int,
        num_samples: int,
        batches: Callable[[], list[Batch]],
        evaluate: Callable[[Projection, Batch], LossSum],
        captions: Captions | None,
    ) -> None:
        self._config, self._max_steps, self._num_samples = config, max_steps, num_samples
        self._batches, self._evaluate, self._captions = batches, evaluate, captions

    def due(self, step: int, metrics: Metrics) -> bool:
        """Whether step `step` is one to look after and was not looked at: the last, and each `every`-th from 0 on."""
        every = self._config.every
        wanted = step == self._max_steps or (every > 0 and step % every == 0)
        return wanted and not from_first(step in metrics.looks)

    def loss(self, projection: Projection) -> tuple[float, int]:
        """Mean loss over all counted targets, and their number."""
        losses, targets = 0.0, 0
        for batch in self._batches():
            loss, count = jax.device_get(self._evaluate(projection, batch))
            losses, targets = losses + float(loss), targets + int(count)
        return losses / max(targets, 1), targets

    def look(self, step: int, projection: Projection, metrics: Metrics) -> None:
        """Writes the loss, and what the model says of a few pictures, with the projection of after `step` steps."""
        loss, targets = self.loss(projection)
        metrics.say(f"step {step}  held-out loss {loss:.4f} over {self._num_samples} samples")
        if self._captions is not None and metrics.writes:
            here = jax.tree.map(np.asarray, projection)  # only this process asks the model
            self._captions.write(step, here, metrics)
        # Last: its line says that the look is complete.
        metrics.write_held_out(step, loss=loss, samples=self._num_samples, tokens=targets)
