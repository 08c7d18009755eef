"""What a person types: `minigpt4 chat | train | convert`. Arguments, printing and process-wide settings.

Not for: logic worth testing without a terminal; that is in `api.py` and `training/`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.config import TrainConfig, UserError, load, to_yaml

if TYPE_CHECKING:
    from minigpt4_jax.api import Chat
    from minigpt4_jax.training.state import Projection

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it (128 + SIGINT)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for a problem the user can mend (one message), or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="minigpt4", description="Look at a picture and talk about it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_chat(commands)
    _add_train(commands)
    convert = commands.add_parser(
        "convert", help="convert weights (the same as python -m convert)", add_help=False
    )
    convert.add_argument("arguments", nargs=argparse.REMAINDER)
    convert.set_defaults(run=_convert)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["convert"]:  # its own parser knows its options, --help too
        return _convert(argparse.Namespace(arguments=arguments[1:]))
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"minigpt4: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED


# --- chat ---------------------------------------------------------------------------------------------------------


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk about a picture",
        description="Asks the questions in turn, with memory, and exits; without a question it opens a conversation.",
    )
    chat.add_argument("picture", help="a picture file (JPEG, PNG, WebP, GIF, BMP, TIFF)")
    chat.add_argument("questions", nargs="*", metavar="QUESTION")
    chat.add_argument("--preset", default="smol", help="the model (default: %(default)s)")
    chat.add_argument("--projection", help="a projection file instead of the shipped one")
    chat.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)"
    )
    chat.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="P", help="1.0 is off (default)"
    )
    chat.add_argument(
        "--context", type=int, default=1024, metavar="N", help="longest conversation, in tokens"
    )
    chat.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    if not os.path.isfile(args.picture):
        raise UserError(
            f"There is no picture at {args.picture!r}. Expected a file; a path with spaces needs quotes."
        )
    if not all(question.strip() for question in args.questions):
        raise UserError("A question is empty; expected some text, or no question to open a chat.")
    _set_up_jax()
    from convert.__main__ import tensor_bar
    from minigpt4_jax.api import GenerationConfig, MiniGPT4
    from minigpt4_jax.data.images import load_image

    picture = load_image(args.picture)  # before minutes of loading: a bad file is said at once
    generation = GenerationConfig(
        max_new_tokens=args.max_new_tokens, repetition_penalty=args.repetition_penalty
    )
    with tensor_bar() as progress:
        model = MiniGPT4.load(
            args.preset, projection=args.projection, context=args.context, progress=progress
        )
    chat = model.start_chat(generation)
    chat.add_image(picture)
    if not args.questions:
        return _converse(chat)
    for number, question in enumerate(args.questions):
        if len(args.questions) > 1:
            print(("\n" if number else "") + f"> {question}")
        _print_answer(chat, question)
    return 0


def _converse(chat: Chat) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history in input())
    print(
        "Ask about the picture. Ctrl-C stops an answer; an empty line or Ctrl-D ends.", flush=True
    )
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not question:
            return 0
        try:
            _print_answer(chat, question)
        except KeyboardInterrupt:
            print(" [stopped]")
        except UserError as error:
            print(f"minigpt4: {error}", file=sys.stderr)


def _print_answer(chat: Chat, question: str) -> None:
    for piece in chat.stream(question):
        print(piece, end="", flush=True)
    print(flush=True)
    if chat.finish_reason == "length":
        print("[cut off here: --max-new-tokens or --context is reached]", file=sys.stderr)


# --- train --------------------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train the projection (the same as train.py)")
    train.add_argument("--config", required=True, type=Path, metavar="PATH", help="a YAML file")
    train.add_argument(
        "--print-config", action="store_true", help="print the merged configuration and exit"
    )
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. optimizer.init_lr=1e-3 workdir=runs/a",
    )
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    config = load(TrainConfig, args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    _set_up_jax()
    from convert.__main__ import tensor_bar
    from convert.projection import read_projection
    from minigpt4_jax.api import load_frozen
    from minigpt4_jax.presets import get_preset
    from minigpt4_jax.training.loop import train

    start = None
    if config.init_projection not in ("ridge", "random"):
        start, _ = read_projection(Path(config.init_projection), get_preset(config.preset).model)
    with tensor_bar() as progress:
        params, tokenizer = load_frozen(config.preset, progress=progress)
    train(
        config,
        params=params,
        tokenizer=tokenizer,
        start=start,
        save_projection=lambda path, projection: _save_projection(config, path, projection),
    )
    print(f"Done: {Path(config.workdir) / 'projection.safetensors'}")
    return 0


def _save_projection(config: TrainConfig, path: Path, projection: Projection) -> None:
    from convert.projection import ProjectionInfo, write_projection
    from convert.smol import LANGUAGE, VISION
    from minigpt4_jax.presets import get_preset

    info = ProjectionInfo(
        config=get_preset(config.preset).model,
        licence=config.licence,
        attribution=config.attribution,
        frozen_parts={"vit": VISION.member_sha256, "llama": LANGUAGE.member_sha256},
        training={
            "set": ", ".join(Path(s.path).name for s in config.data.all_sources().values()),
            "start": Path(config.init_projection).name,
            "batch_size": config.data.batch_size,
            "optimizer": dataclasses.asdict(config.optimizer),
        },
    )
    write_projection(path, projection, info=info)


# --- convert and what all commands share ---------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    from convert.__main__ import main as convert_main

    return convert_main(args.arguments)


def _set_up_jax() -> None:
    """Process-wide settings: where compiled programs are kept between calls, and quiet libraries."""
    import logging

    import jax

    from convert.fetch import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    logging.getLogger("absl").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
