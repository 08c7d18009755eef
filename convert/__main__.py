"""`python -m convert`: what a person types to turn other programs' weights into this project's, and back.

For: the commands, a progress bar, what was made, exit codes (0 done, 2 with the whole list of problems).
Not for: the options (`arguments.py`), nor the work itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from convert.against_torch import compare_with_torch
from convert.arguments import make_parser
from convert.export import export_llama
from convert.facts import describe_file, print_facts
from convert.model import Written, require_new, write_model
from convert.parts import open_model
from convert.projection import ProjectionInfo, read_projection, write_projection, write_released
from convert.rules import Tree
from convert.settings import PATHS, ConvertConfig
from convert.smol import prepare_smol
from convert.verify import verify_model
from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import load, to_yaml
from minigpt4_jax.exits import run_command
from minigpt4_jax.model_folder import ModelFolder, find_preset

_out = Console()
_err = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or one of `exits.py` with one message."""
    run = {
        "smol": _smol,
        "preset": _convert_preset,
        "inspect": _inspect,
        "verify": _verify,
        "export": _export,
        "projection": _projection,
    }
    args = make_parser(run).parse_args(argv)

    def command() -> int:
        args.run(args)
        return 0

    def say(text: str) -> None:
        _err.print(f"[bold red]error:[/] {_plain(text)}", highlight=False, soft_wrap=True)

    return run_command(command, say=say)


# --- commands ---------------------------------------------------------------------------------------------------------


def _smol(args: argparse.Namespace) -> None:
    del args
    with tensor_bar() as progress:
        folder = prepare_smol(progress)
    sources = ModelFolder(folder).sources
    table = Table("part", "from", "licence", "SHA-256")
    for part, source in sources.items():
        name = f"{source['project']} {source['version']}: {Path(source['member']).name}"
        table.add_row(*map(_plain, (part, name, source["licence"], source["member_sha256"][:12])))
    _out.print(table)
    _out.print(str(folder), highlight=False, soft_wrap=True)


def _convert_preset(args: argparse.Namespace) -> None:
    settings = _settings(args, load(ConvertConfig, args.config, args.overrides))
    if args.print_config:
        _out.print(to_yaml(settings), end="", highlight=False, markup=False, soft_wrap=True)
        return
    if not settings.out:
        raise UserError("--out is not given; expected the folder to write.")
    out = Path(settings.out)
    require_new(out)
    model = open_model(settings, args.preset)
    for note in model.notes:
        _say(f"note: {note}")
    said: list[str] = []
    try:
        with tensor_bar() as progress:
            done = write_model(
                out,
                model.plans,
                preset=model.preset,
                tokenizer=lambda folder: said.extend(model.tokenizer(folder)),
                facts=model.facts,
                settings={"preset": args.preset, **dataclasses.asdict(settings.absolute())},
                progress=progress,
            )
    except KeyboardInterrupt:
        _err.print("The same command goes on behind the last whole layer.")
        raise
    print_facts(describe_file(out), _out)
    _print_left_out(done)
    for note in said:
        _say(f"tokenizer: {note}")
    if done.kept:
        _say(f"{done.kept} files of weights were whole from an earlier call and were kept")
    _say(f"Written to {out}. Talk to it: minigpt4 chat PICTURE --model {out}")


def _settings(args: argparse.Namespace, base: ConvertConfig) -> ConvertConfig:
    """`base` with the options that were typed."""
    names = (*PATHS, "out", "dtype", "excuse")
    typed = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if "excuse" in typed:
        typed["excuse"] = (*base.excuse, *typed["excuse"])
    return dataclasses.replace(base, **typed)


def _inspect(args: argparse.Namespace) -> None:
    for path in args.files:
        print_facts(describe_file(path), _out)


def _verify(args: argparse.Namespace) -> None:
    asked = {k: v for k in ("picture", "prompt") if (v := getattr(args, k)) is not None}
    if asked and not args.against_torch:
        raise UserError(f"--{next(iter(asked))} is for --against-torch; give both, or neither.")
    folder = ModelFolder(args.folder)
    name, remembered = ConvertConfig.of_folder(folder)
    settings = _settings(args, remembered)
    settings.require_there(args.folder)
    with tensor_bar() as progress:
        count, size = verify_model(folder, open_model(settings, name), progress)
    _say(
        f"{args.folder}: {count} tensors ({size / 1e9:.2f} GB) are those of their sources, bit for bit"
    )
    if args.against_torch:
        compared = compare_with_torch(folder, name, settings, **asked)
        compared.print(_out)
        compared.require_same()


def _export(args: argparse.Namespace) -> None:
    if args.projection is None and args.llm is None:
        raise UserError("Nothing to export; expected --projection FILE, --llm DIR, or both.")
    folder = ModelFolder(args.folder)
    folder.require_whole()
    if args.projection is not None:
        projection, info = _projection_of(folder)
        _write_projection(args.projection, projection, info)
        _say(f"The projection: {args.projection}")
    if args.llm is not None:
        with tensor_bar() as progress:
            export_llama(
                folder,
                args.llm,
                config=folder.preset.model,
                tokenizer=Path(args.folder),
                on_tensor=lambda done, total, _: progress("Exporting", done, total),
            )
        _say(f"The language model: {args.llm}")


def _projection(args: argparse.Namespace) -> None:
    config = find_preset(args.model).model
    projection, info = read_projection(args.source, config)
    plain = ProjectionInfo(config=config, licence=args.licence, attribution="", frozen_parts={})
    dtype = "float16" if args.float16 else "float32"
    _write_projection(args.out, projection, info or plain, dtype=dtype)
    shape = list(projection["kernel"].shape)
    _say(f"{args.out}: {shape[0]} -> {shape[1]}, for {args.model}")


# --- shared -----------------------------------------------------------------------------------------------------------


def _projection_of(folder: ModelFolder) -> tuple[Tree, ProjectionInfo]:
    leaves = {leaf: f"llama_proj/{leaf}" for leaf in ("kernel", "bias")}
    if not set(leaves.values()) <= set(folder.names()):
        raise UserError(
            f"{folder.path} holds no projection; expected a folder that `python -m convert PRESET` wrote. A projection "
            "file by itself is changed with `python -m convert projection`."
        )
    said = {"licence": "", "attribution": "", "frozen_parts": {}} | folder.sources["llama_proj"]
    del said["files"]
    info = ProjectionInfo(config=folder.preset.model, **said)
    return {leaf: folder.get(name) for leaf, name in leaves.items()}, info


def _write_projection(
    out: Path, projection: Tree, info: ProjectionInfo, *, dtype: str = "float32"
) -> None:
    """In the form that the file's name says."""
    if out.suffix == ".pth":
        write_released(out, projection)
    elif out.suffix == ".safetensors":
        write_projection(out, projection, info=info, dtype=dtype)
    else:
        raise UserError(f"{out} ends in {out.suffix!r}; expected .safetensors or .pth.")


def _print_left_out(done: Written) -> None:
    """One line per reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in done.excused:
        reasons.setdefault(reason, []).append(name)
    for reason, names_ in reasons.items():
        shown = ", ".join(names_[:3]) + (f" and {len(names_) - 3} more" if len(names_) > 3 else "")
        _say(f"left out: {shown}: {reason}")


def _say(text: str) -> None:
    _out.print(_plain(text), highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """`[in, out]` is no markup."""
    return text.replace("[", r"\[")


@contextmanager
def tensor_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, shown from the first tensor on: pip draws its own while it fetches."""
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


if __name__ == "__main__":
    sys.exit(main())
