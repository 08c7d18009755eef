"""What a person types: `minigpt4 chat | caption | serve | train | plan | convert`. Arguments, printing, settings.

Not for: logic worth testing without a terminal; that is in `api.py`, `loading.py`, `serving/` and `training/`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.cli_caption import add_caption
from minigpt4_jax.cli_options import add_model_options, load_model, set_up_jax, typed_generation
from minigpt4_jax.cli_plan import add_plan
from minigpt4_jax.cli_serve import add_serve
from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import load, to_yaml
from minigpt4_jax.exits import run_command
from minigpt4_jax.train_config import TrainConfig

if TYPE_CHECKING:
    from minigpt4_jax.api import Chat
    from minigpt4_jax.training.state import Projection


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or one of `exits.py` with one message."""
    parser = argparse.ArgumentParser(
        prog="minigpt4", description="Look at a picture and talk about it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_chat(commands)
    add_caption(commands)
    add_serve(commands)
    _add_train(commands)
    add_plan(commands)
    convert = commands.add_parser(
        "convert", help="convert weights (the same as python -m convert)", add_help=False
    )
    convert.add_argument("arguments", nargs=argparse.REMAINDER)
    convert.set_defaults(run=_convert)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["convert"]:  # its own parser knows its options, --help too
        return _convert(argparse.Namespace(arguments=arguments[1:]))
    args = parser.parse_args(arguments)
    return run_command(
        lambda: int(args.run(args) or 0),
        say=lambda text: print(f"minigpt4: {text}", file=sys.stderr),
    )


# --- chat ---------------------------------------------------------------------------------------------------------


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk about a picture",
        description="Asks the questions in turn, with memory, and exits; without a question it opens a conversation.",
    )
    chat.add_argument("picture", help="a picture file (JPEG, PNG, WebP, GIF, BMP, TIFF)")
    chat.add_argument("questions", nargs="*", metavar="QUESTION")
    chat.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="a further picture, shown with the first question; may be given again",
    )
    add_model_options(chat)
    chat.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    from minigpt4_jax.data.images import load_image

    # Before seconds of importing and minutes of loading: a bad file is said at once.
    pictures = [load_image(path) for path in (args.picture, *args.image)]
    if not all(question.strip() for question in args.questions):
        raise UserError("A question is empty; expected some text, or no question to open a chat.")
    generation = typed_generation(args)
    model = load_model(args, num_slots=1)

    def start() -> Chat:
        chat = model.start_chat(generation)
        for picture in pictures:
            chat.add_image(picture)
        return chat

    chat = start()
    if not args.questions:
        return _converse(chat, start)
    for number, question in enumerate(args.questions):
        if len(args.questions) > 1:
            print(("\n" if number else "") + f"> {question}")
        _print_answer(chat, question)
    return 0


COMMANDS = """\
/image PATH   shows another picture; the next question is about it, and all stay in view
/reset        begins again, with the pictures that the program was started with
/help         shows this
Ctrl-C stops an answer; an empty line or Ctrl-D ends. A question that begins with / needs a space before it."""


def _converse(chat: Chat, start: Callable[[], Chat]) -> int:
    """Reads questions and commands from the terminal until an empty line; `start` begins a conversation again."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history in input())
    print(
        "Ask about the picture. Ctrl-C stops an answer; an empty line or Ctrl-D ends; /help shows more.",
        flush=True,
    )
    while True:
        try:
            line = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not line.strip():
            return 0
        try:
            if line.startswith("/"):
                chat = _run_command(line, chat, start)
            else:
                _print_answer(chat, line.strip())
        except KeyboardInterrupt:
            print(" [stopped]")
        except UserError as error:
            print(f"minigpt4: {error}", file=sys.stderr)


def _run_command(line: str, chat: Chat, start: Callable[[], Chat]) -> Chat:
    """Does what a line that begins with `/` says and returns the conversation that goes on."""
    name, _, rest = line.strip().partition(" ")
    path = os.path.expanduser(_unquoted(rest.strip()))
    if name == "/image" and path:
        chat.add_image(path)
        print("Seen: the next question is about it.", flush=True)
    elif name == "/reset" and not path:
        chat = start()
        print("A new conversation, with the first pictures.", flush=True)
    elif name == "/help" and not path:
        print(COMMANDS, flush=True)
    else:
        raise UserError(
            f"There is no command {line.strip()!r}; expected /image PATH, /reset or /help. "
            "To ask a question that begins with /, put a space before it."
        )
    return chat


def _unquoted(text: str) -> str:
    """A path as people paste it from a shell: with one pair of quotes around it, or bare, spaces and all."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


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
    set_up_jax()
    from minigpt4_jax.training.together import run_beside_others

    return run_beside_others(lambda: _train_here(config), config=config.distributed)


def _train_here(config: TrainConfig) -> int:
    from convert.__main__ import tensor_bar
    from convert.projection import read_projection
    from minigpt4_jax.captioner import Captioner
    from minigpt4_jax.loading import open_frozen
    from minigpt4_jax.model_folder import find_preset
    from minigpt4_jax.training.distributed import is_first_process
    from minigpt4_jax.training.loop import train
    from minigpt4_jax.training.together import first_process_first

    start = None
    if config.init_projection not in ("ridge", "random"):
        start, _ = read_projection(Path(config.init_projection), find_preset(config.model).model)
    # `smol` is fetched and converted where it is not yet.
    with first_process_first("model"), tensor_bar() as progress:
        frozen, tokenizer = open_frozen(config.model, progress=progress)
    train(
        config,
        frozen=frozen,
        tokenizer=tokenizer,
        start=start,
        save_projection=lambda path, projection: _save_projection(config, path, projection),
        caption=Captioner(config),
    )
    if is_first_process():
        print(f"Done: {Path(config.workdir) / 'projection.safetensors'}")
    return 0


def _save_projection(config: TrainConfig, path: Path, projection: Projection) -> None:
    from convert.projection import ProjectionInfo, write_projection
    from minigpt4_jax.loading import frozen_parts
    from minigpt4_jax.model_folder import find_preset

    info = ProjectionInfo(
        config=find_preset(config.model).model,
        licence=config.licence,
        attribution=config.attribution,
        frozen_parts=frozen_parts(config.model),
        training={
            "set": ", ".join(Path(s.path).name for s in config.data.all_sources().values()),
            "start": Path(config.init_projection).name,
            "batch_size": config.data.batch_size,
            "optimizer": dataclasses.asdict(config.optimizer),
        },
    )
    write_projection(path, projection, info=info)


# --- convert ---------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    from convert.__main__ import main as convert_main

    return convert_main(args.arguments)


if __name__ == "__main__":
    sys.exit(main())
