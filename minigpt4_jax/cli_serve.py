"""`minigpt4 serve`: its arguments, its log, and how far compiling is.

Not for: the server (`serving/server.py`), nor what it may be told (`serve_config.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.cli_options import set_up_jax
from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import load, to_yaml
from minigpt4_jax.exits import end_process
from minigpt4_jax.serve_config import ServeConfig

if TYPE_CHECKING:
    from minigpt4_jax.api import MiniGPT4

EXTRA = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "httpx2")
"""What the extra `serve` brings."""


def add_serve(commands: Any) -> None:
    """Adds the command."""
    serve = commands.add_parser(
        "serve",
        help="serve an OpenAI-compatible API and a chat page (the same as serve.py)",
        description="Serves a model at /v1/chat/completions, and a page to chat on. Without --config: the smol model, "
        "on this machine only.",
    )
    serve.add_argument("--config", type=Path, metavar="PATH", help="a YAML file of configs/serve")
    serve.add_argument(
        "--print-config", action="store_true", help="print the merged configuration and exit"
    )
    serve.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. port=8001 limits.max_waiting=16"
    )
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    config = load(ServeConfig, args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    try:
        from minigpt4_jax.serving.server import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        raise UserError(
            f"{error.name} is not installed; expected the libraries of the server. Install them with: "
            'pip install "minigpt4_jax[serve]"'
        ) from error
    set_up_jax()
    _set_up_log()
    with _compile_bar() as progress:
        code = serve(config, load_model=lambda: _load(config), say=_say, progress=progress)
    # The engine, a compile or the decoding of a picture may still be under way, however it ended.
    return end_process(code)


def _load(config: ServeConfig) -> MiniGPT4:
    from convert.__main__ import tensor_bar
    from minigpt4_jax.api import MiniGPT4

    with tensor_bar() as progress:
        return MiniGPT4.load(
            config.model,
            projection=config.projection or None,
            weights=config.weights,
            cache=config.cache,
            context=config.context,
            num_slots=config.num_slots,
            progress=progress,
        )


def _say(text: str) -> None:
    """On stderr, if anybody is there: a server goes on without (`minigpt4 serve 2>&1 | head`)."""
    with contextlib.suppress(OSError):
        print(f"minigpt4: {text}", file=sys.stderr, flush=True)


def _set_up_log() -> None:
    """One line each, on stderr, with the time."""
    logging.basicConfig(
        format="%(asctime)s %(levelname).1s %(name)s %(message)s", level=logging.WARNING
    )
    logging.getLogger("minigpt4_jax").setLevel(logging.INFO)


@contextlib.contextmanager
def _compile_bar() -> Iterator[Callable[[int, int], None]]:
    """Tells how many programs are compiled: a bar on a terminal, else four lines of the log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    log = logging.getLogger("minigpt4_jax.serving")
    if not console.is_terminal:

        def note(done: int, total: int) -> None:
            if done == total or done % -(-total // 4) == 0:
                log.info("compiled %d of %d programs", done, total)

        yield note
        return
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.stop()

        yield show
