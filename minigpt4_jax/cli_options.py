"""What commands with answers share: which model, how it answers, and process-wide settings of JAX.

Not for: the commands themselves (`cli.py`, `cli_caption.py`), nor the ranges of settings (`presets.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from minigpt4_jax.config import UserError

if TYPE_CHECKING:
    from minigpt4_jax.api import MiniGPT4
    from minigpt4_jax.presets import GenerationConfig


def add_model_options(command: Any) -> None:
    """Which model, and how it answers: the options that commands with answers share."""
    command.add_argument(
        "--model",
        default="smol",
        metavar="NAME",
        help="smol, or a folder that `minigpt4 convert` wrote (default: %(default)s)",
    )
    command.add_argument("--projection", help="a projection file instead of the shipped one")
    command.add_argument(
        "--context", type=int, default=1024, metavar="N", help="longest conversation, in tokens"
    )
    command.add_argument(
        "--weights",
        default="auto",
        metavar="KIND",
        help="float32, bfloat16, int8, or auto: bfloat16 on an accelerator, float32 on a CPU",
    )
    command.add_argument(
        "--cache",
        default="auto",
        metavar="KIND",
        help="what answers under way are kept as: int8, or auto: what is computed in",
    )
    answers = command.add_argument_group(
        "how answers are written",
        "Without these, as the preset does: smol takes the likeliest word.",
    )
    for name, (kind, metavar, explanation) in GENERATION_OPTIONS.items():
        answers.add_argument(_flag(name), dest=name, type=kind, metavar=metavar, help=explanation)


GENERATION_OPTIONS: dict[str, tuple[type, str, str]] = {
    "max_new_tokens": (int, "N", "longest answer, in tokens"),
    "min_new_tokens": (int, "N", "shortest answer, in tokens"),
    "temperature": (float, "T", "0 takes the likeliest word, 1 draws as the model says"),
    "top_k": (int, "K", "draw only from the K likeliest words; 0 is off"),
    "top_p": (float, "P", "draw only from the likeliest words that reach P together; 1 is off"),
    "min_p": (
        float,
        "P",
        "draw only from words at least P times as likely as the likeliest; 0 is off",
    ),
    "repetition_penalty": (
        float,
        "R",
        "above 1, words already written become less likely; 1 is off",
    ),
    "presence_penalty": (float, "X", "above 0, words already written become less likely, once"),
    "frequency_penalty": (
        float,
        "X",
        "above 0, words become less likely each time they are written",
    ),
    "num_beams": (
        int,
        "N",
        "search with N beams and give the most probable answer found; 1 is off",
    ),
    "length_penalty": (float, "X", "with beams: above 0 long answers gain, below 0 short ones"),
    "seed": (int, "S", "draw the same answers again"),
}
"""The fields of `GenerationConfig`, as options."""


def _flag(name: str) -> str:
    return "--beams" if name == "num_beams" else f"--{name.replace('_', '-')}"


def typed_generation(args: argparse.Namespace) -> GenerationConfig:
    """The preset's settings with those that were typed. Raises `UserError` for one that would change nothing."""
    from minigpt4_jax.model_folder import find_preset

    typed = {
        name: value for name in GENERATION_OPTIONS if (value := getattr(args, name)) is not None
    }
    generation = dataclasses.replace(find_preset(args.model).generation, **typed)
    if "length_penalty" in typed and generation.num_beams == 1:
        raise UserError(
            "--length-penalty would change nothing: only beams compare answers by it. Expected --beams above 1 with it."
        )
    idle = [_flag(name) for name in ("top_k", "top_p", "min_p", "seed") if name in typed]
    if idle and generation.temperature == 0:
        raise UserError(
            f"{' and '.join(idle)} would change nothing: the temperature is 0, which always takes the likeliest word. "
            "Expected --temperature above 0 with it, for example 1."
        )
    return generation


def load_model(args: argparse.Namespace, *, num_slots: int) -> MiniGPT4:
    """The model that the options name, with a bar on stderr where it must be made first."""
    set_up_jax()
    from convert.__main__ import tensor_bar
    from minigpt4_jax.api import MiniGPT4

    with tensor_bar() as progress:
        return MiniGPT4.load(
            args.model,
            projection=args.projection,
            weights=args.weights,
            cache=args.cache,
            context=args.context,
            num_slots=num_slots,
            progress=progress,
        )


def set_up_jax() -> None:
    """Process-wide settings: a GPU's memory, where compiled programs are kept between calls, and quiet libraries."""
    import logging

    import jax

    from convert.fetch import cache_folder
    from minigpt4_jax.gpu_memory import take_gpu_memory

    take_gpu_memory()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Orbax logs a traceback for what it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
