"""`minigpt4 caption`: its arguments, its progress bar and how it ends.

Not for: which pictures there are, the loop (`caption.py`) and the file (`caption_file.py`), which need no terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.caption import (
    PROMPT,
    Item,
    caption_pictures,
    describe,
    list_pictures,
    run_settings,
)
from minigpt4_jax.caption_file import CaptionFile
from minigpt4_jax.cli_options import add_model_options, load_model, typed_generation
from minigpt4_jax.config import UserError
from minigpt4_jax.exits import INTERRUPTED

if TYPE_CHECKING:
    from minigpt4_jax.presets import GenerationConfig


def add_caption(commands: Any) -> None:
    """Adds the command."""
    caption = commands.add_parser(
        "caption",
        help="caption many pictures into a JSONL file",
        description="Asks the prompt about every picture. Run again with the same --out, it goes on where it stopped.",
    )
    caption.add_argument(
        "source",
        type=Path,
        metavar="DIR_OR_LIST",
        help="a folder (all pictures below it), a text file with a path a line, JSONL with image and prompt, a picture",
    )
    caption.add_argument("--out", required=True, type=Path, metavar="FILE", help="a JSONL file")
    caption.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="default: %(default)s")
    caption.add_argument(
        "--retry-errors", action="store_true", help="try pictures again whose rows are errors"
    )
    caption.add_argument(
        "--slots", type=int, default=8, metavar="N", help="captions written side by side"
    )
    add_model_options(caption)
    caption.set_defaults(run=_caption)


def _caption(args: argparse.Namespace) -> int:
    if not args.prompt.strip():
        raise UserError("The prompt is empty; expected some text.")
    if args.slots < 1:
        raise UserError(f"--slots is {args.slots}; expected at least 1.")
    if args.out.is_dir():
        raise UserError(
            f"--out is {args.out}, a folder; expected a file to write, such as {args.out / 'captions.jsonl'}."
        )
    generation = typed_generation(args)
    meta = args.out.with_name(f"{args.out.name}.meta.json")
    items, left_out = list_pictures(args.source, ignore=(args.out, meta))
    settings = run_settings(
        args.source,
        model=args.model,
        prompt=args.prompt,
        context=args.context,
        generation=generation,
    )
    # Before seconds of importing and minutes of loading: a file that cannot be written is said at once.
    with CaptionFile(args.out, settings, retry_errors=args.retry_errors) as file:
        left = sum(item.name not in file.rows for item in items)
        said = [*file.mended, f"{len(items)} pictures, {left} to caption."]
        if left_out:
            said.append(f"Left out: {describe(left_out)}.")
        print(*said, sep="\n", file=sys.stderr, flush=True)
        try:
            if left:
                _caption_items(args, items, file, generation)
        except KeyboardInterrupt:
            print(
                f"\nStopped. {args.out} has {len(file.rows)} rows; the same command goes on from there.",
                file=sys.stderr,
            )
            return INTERRUPTED
        if file.errors:
            raise UserError(
                f"{file.errors} of {len(file.rows)} rows in {args.out} are errors. Mend the pictures that they name, "
                "and run the same command with --retry-errors."
            )
    print(f"{len(items)} captions: {args.out}")
    return 0


def _caption_items(
    args: argparse.Namespace,
    items: Sequence[Item],
    file: CaptionFile,
    generation: GenerationConfig,
) -> None:
    model = load_model(args, num_slots=args.slots)
    file.set_model(model.fingerprint)
    with _caption_bar(file, total=len(items)) as row_done:
        caption_pictures(
            model, items, file=file, prompt=args.prompt, generation=generation, progress=row_done
        )


@contextlib.contextmanager
def _caption_bar(file: CaptionFile, *, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr: pictures done, errors, pictures a second, time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    numbers = TextColumn("{task.fields[errors]} errors, {task.fields[rate]:.1f}/s")
    columns = (BarColumn(), MofNCompleteColumn(), numbers, TimeRemainingColumn())
    start, before = time.monotonic(), len(file.rows)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=before, errors=file.errors, rate=0.0)

        def row_done() -> None:
            rate = (len(file.rows) - before) / max(time.monotonic() - start, 1e-3)
            bar.update(task, completed=len(file.rows), errors=file.errors, rate=rate)

        yield row_done
