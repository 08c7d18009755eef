"""`minigpt4 plan`: its arguments and what it shows.

Not for: the numbers (`plan.py`), nor what the compiler says (`plan_compile.py`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import load
from minigpt4_jax.hardware import GIB, parse_gpu, parse_tpu
from minigpt4_jax.plan import (
    STAGE_1,
    UTILISATION,
    Change,
    Plan,
    make_plan,
    read_work,
    to_json,
    what_to_change,
)
from minigpt4_jax.train_config import TrainConfig

if TYPE_CHECKING:
    from minigpt4_jax.plan_compile import Compiled

LONGEST = 8192
"""Tokens; more is a slip of the finger."""


def add_plan(commands: Any) -> None:
    """Adds the command."""
    plan = commands.add_parser(
        "plan",
        help="does a training run fit on a TPU slice or GPUs, and how long will it take",
        description="Memory, time and exchange of a run on devices that need not be there; what to change where it "
        "does not fit. Without --config: the published first stage.",
    )
    plan.add_argument("--config", type=Path, metavar="PATH", help="a YAML file of configs/train")
    plan.add_argument(
        "--model", metavar="NAME", help="a preset such as vicuna-7b, or a model folder"
    )
    where = plan.add_mutually_exclusive_group(required=True)
    where.add_argument("--tpu", metavar="SLICE", help="v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:2x4, ...")
    where.add_argument("--gpu", metavar="GPUS", help="a100-40:4, a100-80:4, h100:8, h200:1, ...")
    plan.add_argument("--length", type=int, metavar="N", help="tokens of a sample")
    plan.add_argument("--targets", type=int, metavar="N", help="supervised tokens of a sample")
    plan.add_argument(
        "--utilisation",
        type=float,
        default=UTILISATION,
        metavar="U",
        help="share of the peak rate that the model's FLOPs are taken to reach (default: %(default)s)",
    )
    plan.add_argument(
        "--compile",
        action="store_true",
        help="also compile train step, prefill and decode step for the TPU slice (the `plan` extra; minutes)",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    plan.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. data.batch_size=128 remat=full"
    )
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    for name in ("length", "targets"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= LONGEST:
            raise UserError(
                f"--{name} is {value}; expected a number of tokens from 1 to {LONGEST}."
            )
    if not 0 < args.utilisation <= 1:
        raise UserError(
            f"--utilisation is {args.utilisation}; expected a share above 0, at most 1."
        )
    if args.compile and not args.tpu:
        raise UserError(
            "--compile is given without --tpu; expected a TPU slice: GPU programs need a GPU to compile."
        )
    if args.config is None and args.model is None:
        raise UserError(
            "Neither --config nor --model is given; expected what to plan for, such as --model vicuna-7b."
        )
    target = parse_tpu(args.tpu) if args.tpu else parse_gpu(args.gpu)
    overrides = [*(STAGE_1 if args.config is None else ()), *args.overrides]
    if args.model is not None:
        overrides.append(f"model={args.model}")
    config = load(TrainConfig, args.config, overrides)
    plan = make_plan(read_work(config, length=args.length, targets=args.targets), target)
    compiled: list[Compiled] = []
    if args.compile:
        from minigpt4_jax.plan_compile import compile_plan

        compiled = compile_plan(plan, config.optimizer)
    if args.json:
        found = to_json(plan, utilisation=args.utilisation)
        found |= {"compiled": [each.to_json() for each in compiled]} if args.compile else {}
        print(json.dumps(found, indent=2))
    else:
        show(plan, compiled, utilisation=args.utilisation)
    return 0


def show(plan: Plan, compiled: list[Compiled], *, utilisation: float) -> None:
    """Prints a plan as tables on standard output."""
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True)
    work, device = plan.work, plan.target.device
    out.print(
        f"{work.name}: {work.steps:,} steps of {work.batch_size} samples, {work.length} tokens each ({work.targets} "
        f"supervised), remat {work.remat}, features {'made in the loop' if work.vision else 'cached'}"
    )
    out.print(
        f"{plan.target.name}: {plan.target.chips} chips on {plan.target.hosts} "
        f"host{'s' if plan.target.hosts > 1 else ''}, {device.hbm_bytes / GIB:.0f} GiB and "
        f"{device.flops_per_s / 1e12:.0f} TFLOP/s each"
    )
    for note in work.notes:
        out.print(f"Assumed: {note}.")
    out.print(f"Mesh {plan.mesh.reason}")
    out.print(_memory_table(plan))
    out.print(_time_table(plan, utilisation))
    if plan.fits:
        out.print("It fits, by the estimate.")
    else:
        _show_changes(out, plan, what_to_change(plan))
    if compiled:
        out.print(_compiled_table(compiled))
        for each in compiled:
            if each.error:
                out.print(f"{each.name}: {each.error}")


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _memory_table(plan: Plan) -> Any:
    need = plan.memory
    table = _table("Memory on each device", "what", "GiB")
    for what, size in (
        ("frozen language model", need.weights),
        ("kept for the backward pass", need.activations),
        ("the layer at work", need.layer),
        ("logits of the targets", need.logits),
        ("projection and optimizer", need.optimizer),
        ("image tower", need.vision),
    ):
        table.add_row(what, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("together", f"{need.total / GIB:.2f}")
    table.add_row("that may be filled", f"{plan.limit_bytes / GIB:.2f}")
    return table


def _time_table(plan: Plan, utilisation: float) -> Any:
    time, work = plan.time, plan.work
    table = _table("A step takes at least", "what", "amount", "seconds")
    table.add_row(
        "FLOPs at the peak rate", f"{plan.flops.hardware / 1e12:,.0f} TFLOP", f"{time.compute:.4f}"
    )
    table.add_row("memory read and written", "", f"{time.memory:.4f}")
    table.add_row(
        "exchange, per device", f"{plan.exchange.total / 1e9:,.2f} GB", f"{time.exchange:.4f}"
    )
    table.add_section()
    rate = work.batch_size / time.floor
    table.add_row("the longest of these", f"{rate:,.0f} samples/s", f"{time.floor:.4f}")
    table.add_section()
    table.add_row("the run at that floor", _duration(plan.hours_floor), "")
    table.add_row(f"at {utilisation:.0%} utilisation", _duration(plan.hours_at(utilisation)), "")
    return table


def _duration(hours: float) -> str:
    return f"{hours:,.2f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _show_changes(out: Any, plan: Plan, changes: list[Change]) -> None:
    table = _table("It does not fit. What to change", "setting", "GiB", "of", "fits", "at least")
    for change in changes:
        found = change.plan
        table.add_row(
            change.what,
            f"{found.memory.total / GIB:.1f}",
            f"{found.limit_bytes / GIB:.1f}",
            "yes" if found.fits else "no",
            _duration(found.hours_floor),
        )
    out.print(table)
    if not changes or not changes[-1].plan.fits:
        out.print("Nothing that was tried fits; take a smaller model or devices with more memory.")


def _compiled_table(compiled: list[Compiled]) -> Any:
    table = _table(
        "Compiled by XLA:TPU, on each device",
        "program",
        "s",
        "arguments, GiB",
        "temporary",
        "results",
        "together",
    )
    for each in compiled:
        if each.error:
            table.add_row(each.name, f"{each.seconds:.0f}", "does not compile", "", "", "")
            continue
        sizes = (
            each.argument_bytes,
            each.temp_bytes,
            each.output_bytes - each.alias_bytes,
            each.total_bytes,
        )
        table.add_row(each.name, f"{each.seconds:.0f}", *(f"{size / GIB:.2f}" for size in sizes))
    return table
