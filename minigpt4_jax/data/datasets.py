"""Captioned pictures on disk, and the seeded, resumable stream of training batches over them.

For: the `cc_sbu_align` folder format (`filter_cap.json` and `image/{image_id}.jpg`) and the Grain pipeline that
draws, asks, tokenises and batches. Not for: decoding pictures (training reads cached features by row), web-sized
shards, or placing arrays on devices.

Differs from the original: a missing picture or an over-long caption is found before the first step, not in it; one
prompt is drawn per sample instead of one per batch; and the order is a function of seed and position, so that a run
continues exactly where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch, collate, join_example, limit_answer, limit_prompt
from minigpt4_jax.data.prompts import (
    Piece,
    Template,
    encode_answer,
    encode_prompt,
    training_pieces,
)
from minigpt4_jax.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

ANNOTATIONS = "filter_cap.json"
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Example:
    """One picture with its words."""

    image_id: str
    image_path: Path
    prompt: str | None
    """A question of this sample's own; None to draw one of the run's."""
    caption: str


@runtime_checkable
class Source(Protocol):
    """What `make_pipeline` reads: examples by index, and pictures numbered by `image_ids`."""

    @property
    def image_ids(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class CcSbuAlign:
    """A folder in the original's stage-2 format, as a random-access source.

    `filter_cap.json` holds `{"annotations": [{"image_id", "caption"}, ...]}` or the bare list; an annotation may have
    its own `"prompt"` (not in the original). Pictures are `image/{image_id}.jpg`; several annotations may share one.
    Raises `UserError` listing every missing picture and broken annotation together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        annotations = _read_annotations(self.folder / ANNOTATIONS)
        self._image_folder = self.folder / "image"
        present = (
            {entry.name for entry in self._image_folder.iterdir()}
            if self._image_folder.is_dir()
            else set()
        )
        problems: list[str] = []
        self._examples: list[Example] = []
        self._rows: dict[str, int] = {}
        for number, annotation in enumerate(annotations):
            problem = _annotation_problem(annotation)
            if problem is not None:
                problems.append(f"annotation {number}: {problem}")
                continue
            image_id = str(annotation["image_id"])
            if image_id not in self._rows:
                self._rows[image_id] = len(self._rows)
                if f"{image_id}.jpg" not in present:
                    problems.append(f"annotation {number}: there is no {self.image_path(image_id)}")
            self._examples.append(
                Example(
                    image_id,
                    self.image_path(image_id),
                    annotation.get("prompt"),
                    annotation["caption"],
                )
            )
        _raise_problems(problems, f"{self.folder / ANNOTATIONS} and its pictures do not agree")
        if not self._examples:
            raise UserError(
                f"{self.folder / ANNOTATIONS} has no annotation; expected at least one."
            )
        self.image_ids: tuple[str, ...] = tuple(self._rows)
        """Each picture once, in the order of its first annotation: the rows of a feature cache."""

    def image_path(self, image_id: str) -> Path:
        """Where the picture `image_id` lies."""
        return self._image_folder / f"{image_id}.jpg"

    def image_row(self, image_id: str) -> int:
        """The place of `image_id` in `image_ids`."""
        return self._rows[image_id]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def _read_annotations(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"Cannot read {file} ({error.strerror or error}). Expected a folder with {ANNOTATIONS} and image/."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}).") from error
    annotations = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(annotations, list):
        raise UserError(
            f'{file} holds a {type(content).__name__}; expected {{"annotations": [...]}} or a list.'
        )
    return annotations


def _annotation_problem(annotation: Any) -> str | None:
    if not isinstance(annotation, dict):
        return f"is a {type(annotation).__name__}; expected an object with image_id and caption"
    image_id = annotation.get("image_id")
    if isinstance(image_id, bool) or not isinstance(image_id, str | int) or image_id == "":
        return f"image_id is {image_id!r}; expected a name or a number"
    if not set(str(image_id)).isdisjoint("/\\\0") or str(image_id) in (".", ".."):
        return f"image_id is {image_id!r}; expected the name of a file in image/, without a folder"
    caption = annotation.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        return f"caption is {caption!r}; expected text"
    prompt = annotation.get("prompt")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        return f"prompt is {prompt!r}; expected text, or no prompt at all"
    return None


def _raise_problems(problems: Sequence[str], heading: str) -> None:
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    raise UserError(
        f"{heading}: {len(problems)} problem(s).\n  {shown}"
        + (f"\n  ... and {more} more" if more > 0 else "")
    )


class _Encoded(NamedTuple):
    """A source as ids: what a worker thread needs to make a sample without tokenising."""

    answers: list[list[int]]
    own_prompts: list[list[int] | None]
    image_rows: list[int]
    prompts: list[list[int]]


class Pipeline:
    """An endless iterator of `Batch`, whose position can be saved and restored, and which must be closed.

    A context manager. `get_state()` is small and JSON-like (`{"next_index": batches returned}`); an iterator over the
    same source, seed and settings that is given it continues with the very next batch.
    """

    def __init__(
        self,
        dataset: grain.IterDataset[Batch],
        *,
        batches_per_epoch: float,
        cut_answers: int,
        cut_prompts: int,
    ):
        self._iterator = iter(dataset)
        self.batches_per_epoch = batches_per_epoch
        """Batches until every example was seen once; epochs follow each other without a short batch between."""
        self.cut_answers = cut_answers
        """How many examples have an answer cut by `truncate`."""
        self.cut_prompts = cut_prompts
        """How many different prompts were cut by it."""

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        batch: Batch = next(self._iterator)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the batch that was returned last."""
        return dict(self._iterator.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` gave. Raises `UserError` for anything else."""
        index = state.get("next_index")
        if set(state) != {"next_index"} or not isinstance(index, int) or index < 0:
            raise UserError(
                f"The data position is {state!r}; expected {{'next_index': a number}} as a checkpoint of this "
                "pipeline holds it."
            )
        self._iterator.set_state(dict(state))

    def close(self) -> None:
        """Stops the worker threads. Safe to call twice."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def make_pipeline(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    prompts: Sequence[str | None],
    template: Template,
    tokenizer: Tokenizer,
    num_image_tokens: int,
    max_text_len: int,
    length_multiple: int,
    max_positions: int | None = None,
    max_context_len: int | None = None,
    end_symbol: tuple[Piece, ...] | None = None,
    ignored_targets: Collection[int] = (),
    truncate: bool = False,
    shuffle: bool = True,
    num_threads: int = 1,
    prefetch: int = 8,
) -> Pipeline:
    """The stream of training batches over `source`.

    All text is tokenised and checked here, so that nothing about a sample can fail hours later. Which example comes
    when, and which of `prompts` it is asked with, depends only on `seed` and the position in the stream.

    Args:
      seed: 0 to 2**32 - 1.
      prompts: questions, one drawn per sample; an example's own prompt wins. `(None,)` shows the bare picture.
      max_text_len: longest answer in tokens, end symbol included.
      length_multiple: sequences and targets are padded up to a multiple of this.
      max_positions: longest whole sequence in tokens, if the model has a limit.
      max_context_len: longest prompt, see `batches.limit_prompt`; None for no limit of its own.
      end_symbol, ignored_targets, truncate: see `batches.make_example_tokens`.
      num_threads: batches are made ahead by this many threads; 0 makes them when asked for.
      prefetch: how many batches are made ahead.

    Raises `UserError` that lists every over-long sample together.
    """
    import grain  # imports JAX if it finds it: only training pays for that

    if not prompts:
        raise UserError("There is no prompt to ask with; expected at least one (data.prompts).")

    cut_prompts: set[str | None] = set()

    def prompt_ids(prompt: str | None) -> list[int]:
        pieces = training_pieces(template, prompt)
        ids = encode_prompt(
            template, pieces, tokenizer=tokenizer, num_image_tokens=num_image_tokens
        )
        ids, cut = limit_prompt(
            ids,
            num_bos=int(template.bos is not None),
            max_context_len=len(ids) if max_context_len is None else max_context_len,
            truncate=truncate,
            name=f"prompt {prompt!r}",
        )
        cut_prompts.update([prompt] if cut else [])
        return ids

    def answer_ids(answer: str) -> list[int]:
        return encode_answer(template, answer, tokenizer=tokenizer, end_symbol=end_symbol)

    limits = _Limits(max_text_len, max_positions, truncate)
    encoded, cut_answers = _encode_source(
        source, [prompt_ids(p) for p in prompts], prompt_ids, answer_ids, limits
    )

    def draw_prompt(index: int, rng: np.random.Generator) -> tuple[int, int]:
        # Drawn for every sample, also for one with its own prompt, so that adding a prompt moves no other draw.
        return index, int(rng.integers(len(encoded.prompts)))

    def make_batch(picks: Sequence[tuple[int, int]]) -> Batch:
        examples = [
            join_example(
                encoded.own_prompts[index] or encoded.prompts[choice],
                encoded.answers[index],
                ignored_targets=ignored_targets,
            )
            for index, choice in picks
        ]
        rows = [encoded.image_rows[index] for index, _ in picks]
        return collate(examples, rows, length_multiple=length_multiple)

    dataset = grain.MapDataset.source(range(len(source))).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat().random_map(draw_prompt)
    batches = dataset.batch(batch_size, drop_remainder=True, batch_fn=make_batch)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    return Pipeline(
        batches.to_iter_dataset(options),
        batches_per_epoch=len(source) / batch_size,
        cut_answers=cut_answers,
        cut_prompts=len(cut_prompts),
    )


class _Limits(NamedTuple):
    max_text_len: int
    max_positions: int | None
    truncate: bool


def _encode_source(
    source: Source,
    prompts: list[list[int]],
    prompt_ids: Callable[[str | None], list[int]],
    answer_ids: Callable[[str], list[int]],
    limits: _Limits,
) -> tuple[_Encoded, int]:
    """Tokenises every text of a source once (equal texts once) and checks every length; counts the cut answers."""
    rows = {image_id: row for row, image_id in enumerate(source.image_ids)}
    known_answers: dict[str, list[int]] = {}
    known_prompts: dict[str, list[int]] = {}
    encoded = _Encoded([], [], [], prompts)
    problems: list[str] = []
    cut_answers = 0
    for index in range(len(source)):
        example = source[index]
        name = f"example {index} (picture {example.image_id})"
        if example.caption not in known_answers:
            known_answers[example.caption] = answer_ids(example.caption)
        answer = known_answers[example.caption]
        own = None
        if example.prompt is not None:
            if example.prompt not in known_prompts:
                known_prompts[example.prompt] = prompt_ids(example.prompt)
            own = known_prompts[example.prompt]
        try:
            answer, cut = limit_answer(
                answer, max_text_len=limits.max_text_len, truncate=limits.truncate, name=name
            )
            cut_answers += cut > 0
        except UserError as error:
            problems.append(str(error))
        longest = len(own) if own is not None else max(len(ids) for ids in prompts)
        if limits.max_positions is not None and longest + len(answer) > limits.max_positions:
            problems.append(
                f"{name} has {longest + len(answer)} tokens in all; expected at most {limits.max_positions}, the "
                "model's context. Shorten the prompt or the answer."
            )
        encoded.answers.append(answer)
        encoded.own_prompts.append(own)
        encoded.image_rows.append(rows[example.image_id])
    _raise_problems(problems, "The data set does not fit the training settings")
    return encoded, cut_answers
