"""The tables of README.md and of pages of docs/, from the JSON files of benchmarks/results.

    python benchmarks/page_tables.py

Whatever stands between `<!-- table: NAME -->` and `<!-- end -->` in a page is written anew. Tests compare: a page never
shows a number that is not in the file, and no file holds rows that no page shows. Not for: measuring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("performance", "engine", "plan")),
)
GIB = 2**30
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def ratios(result: dict[str, Any]) -> str:
    """Rows of two sides that took turns (`measuring.summary`), and what they were measured on."""
    lines = ["| what | here | there | ratio | over the rounds |", "|---|---|---|---|---|"]
    for row in result["rows"].values():
        low, high = row["ratio_of_rounds"]
        here, there = row["ms"]["ours"], row["ms"][row["best_variant"]]
        lines.append(
            f"| {row['what']} | {here:,.2f} | {there:,.2f} ({row['best_variant']}) | {row['ratio']:.2f} "
            f"| {low:.2f} to {high:.2f} |"
        )
    most = max(row["load_after"] for row in result["rows"].values())
    rounds = sorted({row.get("rounds", result.get("rounds")) for row in result["rows"].values()})
    said = f"Medians of {' to '.join(map(str, rounds))} rounds"
    return "\n".join([f"{said} {_where(result, most)}.", "", *lines])


def gpu(result: dict[str, Any]) -> str:
    """Rows of a GPU host: what was reached, and the share of what the card can do."""
    lines = ["| what | reached | ms | share |", "|---|---|---|---|"]
    for row in result["rows"].values():
        if "error" in row:
            lines.append(f"| {row['what']} | failed: {row['error'].splitlines()[0][:80]} | | |")
        elif "steps" not in row:
            lines.append(f"| {row['what']} | {_reached(row)} | {row['ms']:,.2f} | {_of(row)} |")
    ceilings = next((row for row in result["rows"].values() if "bytes_per_s" in row), None)
    said = f"{_where(result, None)}.".removeprefix("on ").capitalize()
    if ceilings:
        said += (
            f" Copy bandwidth {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, matmul {ceilings['flop_per_s'] / 1e12:.0f} "
            "TFLOP/s, measured in the process of the first row."
        )
    return "\n".join([said, "", *lines])


def gpu_training(result: dict[str, Any]) -> str:
    """Train steps of a GPU host: samples, the share of the card's own matmul and of its data sheet, memory."""
    lines = [
        "| what | samples/s | ms per step | of its matmul | of its data sheet | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"].values():
        if "error" in row:
            said = f"failed: {row['error'].splitlines()[0][:80]}"
            lines.append(f"| {row['what']} | {said} | | | | |")
            continue
        shares = [
            f"{row[key]:.0%}" if row.get(key) else "" for key in ("share_of_peak", "utilisation")
        ]
        lines.append(
            f"| {row['what']} | {row['samples_per_s']:,.1f} | {row['ms']:,.1f} | {shares[0]} | {shares[1]} "
            f"| {row['peak_bytes'] / 1e9:.1f} |"
        )
    return "\n".join([f"{_where(result, None)}.".removeprefix("on ").capitalize(), "", *lines])


def gpu_settings(result: dict[str, Any]) -> str:
    """Bare decode steps under each set of command buffers, and what XLA made of them."""
    names = (
        "kernels_per_layer",
        "converts_fused",
        "converts_alone",
        "cache_copies",
        "alias_bytes",
        "cache_bytes",
    )
    lines = [
        "| command buffers | step | ms | kernels per layer | int8 converts fused / alone | cache copies | aliased |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in result["rows"].items():
        for step, found in row.get("steps", {}).items():
            kernels, fused, alone, copies, alias, cache = (found[name] for name in names)
            aliased = "the cache" if alias >= cache else f"{alias} of {cache} bytes"
            lines.append(
                f"| {key.removeprefix('settings_')} | {step} | {found['ms']:.3f} | {kernels} | {fused} / {alone} "
                f"| {len(copies)} | {aliased} |"
            )
    return "\n".join(lines)


def quantised(result: dict[str, Any]) -> str:
    """What each form of weights and cache costs in quality."""
    lines = [
        "| form | weights, MB | perplexity | top 1 as float32 | until the first difference | largest logit error |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['form']} | {row['weights_mb']:.0f} | {row['perplexity']:.2f} | {row['top_1']:.1%} "
            f"| {row['until_first_difference']:.0%} | {row['logit_error_max']:.2f} |"
        )
    return "\n".join(lines)


def input_pipeline(result: dict[str, Any]) -> str:
    """Batches made per second from tars, beside what one accelerator takes."""
    lines = [
        "| what | pictures/s | over the rounds | per second of CPU time | of one H200 | real tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"].values():
        low, high = row["images_per_s_of_rounds"]
        lines.append(
            f"| {row['what']} | {row['images_per_s']:,.0f} | {low:,.0f} to {high:,.0f} "
            f"| {row['images_per_cpu_s']:,.0f} | {row['of_h200']:.2f} | {row['padding_efficiency']:.0%} |"
        )
    most = max(row["load_after"] for row in result["rows"].values())
    rounds = max(row["rounds"] for row in result["rows"].values())
    said = (
        f"Medians of {rounds} rounds of {result['batches']} batches of {result['batch_size']} {_where(result, most)}; "
        f"one H200 takes about {result['h200_takes']} pictures/s."
    )
    return "\n".join([said, "", *lines])


def serve_share(result: dict[str, Any]) -> str:
    """The server's share of the bare engine's throughput."""
    lines = [
        "| what | bare, tokens/s | over HTTP | share | over the rounds | equal answers |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in result["rows"].values() if "share" in row]
    for row in rows:
        low, high = row["share_of_rounds"]
        bare, http = row["tokens_per_s"]["bare"], row["tokens_per_s"]["http"]
        lines.append(
            f"| {row['what']} | {bare:,.1f} | {http:,.1f} | {row['share']:.1%} | {low:.1%} to {high:.1%} "
            f"| {row['same_answers']} |"
        )
    said = (
        f"Medians of {result['rounds']} rounds of {result['num_requests']} requests of up to {result['max_tokens']} "
        f"tokens, {result['pictures']:.0%} with a picture, "
        f"{_where(result, max(row['load_after'] for row in rows))}."
    )
    return "\n".join([said, "", *lines])


def serve_load(result: dict[str, Any]) -> str:
    """Open-loop load: when the first token and each further one came, and how many requests were in time."""
    lines = [
        "| offered | requests/s | answered | output tokens/s | TTFT, ms | ITL, ms | TPOT, ms | E2EL, s | goodput |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"].values():
        if "share" in row:
            continue
        all_of_them = row["completed"] + row["failed"]
        lines.append(
            f"| {row['what']} | {row['request_rate']:.2f} | {row['completed']} of {all_of_them} "
            f"| {row['output_throughput']:,.1f} | {_percentiles(row, 'ttft_ms')} | {_percentiles(row, 'itl_ms')} "
            f"| {_percentiles(row, 'tpot_ms')} | {_percentiles(row, 'e2el_ms', unit=1000, digits=2)} "
            f"| {row['goodput_share']:.0%} |"
        )
    said = (
        f"Open loop, gaps with burstiness {result['burstiness']:g}; median / p90 / p99. Goodput: the share with a TTFT "
        f"of at most {result['ttft_slo_ms']:g} ms and a TPOT of at most {result['tpot_slo_ms']:g} ms."
    )
    return "\n".join([said, "", *lines])


def _percentiles(row: dict[str, Any], name: str, *, unit: float = 1, digits: int = 0) -> str:
    values = [row[f"{key}_{name}"] for key in ("median", "p90", "p99")]
    return " / ".join("none" if v is None else f"{v / unit:,.{digits}f}" for v in values)


def plan(result: dict[str, Any]) -> str:
    """What a run needs on devices that people rent, by the estimate."""
    lines = [
        "| model | devices | features | mesh | GiB on each, of | a step | exchange | the run | at 50 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"].values():
        need, seconds, hours = row["bytes_per_device"], row["seconds_per_step"], row["hours"]
        fits = "" if row["fits"] else f"; no: {row['changes'][-1]['what']}"
        limit = max(("compute", "memory", "exchange"), key=lambda name: seconds[name])
        features = "cached" if row["run"]["cached_features"] else "in the loop"
        lines.append(
            f"| {row['model']} | {row['target']} | {features} | {_mesh(row)} "
            f"| {need['total'] / GIB:.1f} of {need['limit'] / GIB:.1f}{fits} | {seconds['floor']:.3f} s, {limit} "
            f"| {row['exchange_bytes_per_device']['total'] / 1e9:.2f} GB | {hours['floor']:.2f} h "
            f"| {hours['at_utilisation']:.2f} h |"
        )
    return "\n".join(lines)


def plan_compiled(result: dict[str, Any]) -> str:
    """The compiler's memory of the same train steps beside the estimate, and of prefill and decode step."""
    lines = [
        "| model | slice | mesh | train step: estimate | XLA:TPU | estimate is | prefill | decode step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in result["rows"].values() if "compiled" in row]
    errors = []
    for row in rows:
        programs = {each["name"]: each for each in row["compiled"]}
        step, others = (
            programs["train step"],
            [programs.get(name) for name in ("prefill", "decode step")],
        )
        guess, share = row["bytes_per_device"]["total"], ""
        if not step["error"]:
            errors.append(guess / step["total_bytes"] - 1)
            share = _off(errors[-1])
        lines.append(
            f"| {row['model']} | {row['target']} | {_mesh(row)} | {guess / GIB:.2f} GiB | {_program(step)} | {share} "
            f"| {' | '.join(map(_program, others))} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    said = (
        f"On each device, and seconds of compiling on two busy CPU cores; {versions}. The estimate is between "
        f"{_off(min(errors))} and {_off(max(errors))}."
    )
    return "\n".join([said, "", *lines])


def _off(share: float) -> str:
    return f"{abs(share):.1%} {'too high' if share > 0 else 'too low'}"


def _mesh(row: dict[str, Any]) -> str:
    sizes = [
        f"{name}={row['mesh'][name]}"
        for name in ("data", "fsdp", "tensor")
        if row["mesh"][name] > 1
    ]
    return " ".join(sizes) or "one device"


def _program(compiled: dict[str, Any] | None) -> str:
    if compiled is None:
        return "not tried"
    if compiled["error"]:
        return f"does not compile: {compiled['error']}"
    return f"{compiled['total_bytes'] / GIB:.2f} GiB, {compiled['seconds']:.0f} s"


COMMANDS = {
    "inference_cpu": "python benchmarks/inference.py --device cpu --out benchmarks/results/inference_cpu.json",
    "inference_gpu": "python benchmarks/inference.py --device gpu --out benchmarks/results/inference_gpu.json",
    "decode_layout": "python benchmarks/decode_layout.py --out benchmarks/results/decode_layout.json",
    "train_cpu": "python benchmarks/train.py --device cpu --out benchmarks/results/train_cpu.json",
    "train_gpu": "python benchmarks/train.py --device gpu --out benchmarks/results/train_gpu.json",
    "quantised": "python benchmarks/quantised.py --out benchmarks/results/quantised.json",
    "input_pipeline": "python benchmarks/input_pipeline.py --out benchmarks/results/input_pipeline.json",
    "serve_cpu": "python benchmarks/serve_load.py --out benchmarks/results/serve_cpu.json",
    "plan": "python benchmarks/plan_table.py --out benchmarks/results/plan.json",
}
"""File of results -> the command that writes it."""

TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "inference_cpu": ("inference_cpu", ratios),
    "decode_layout": ("decode_layout", ratios),
    "train_cpu": ("train_cpu", ratios),
    "train_gpu": ("train_gpu", gpu_training),
    "inference_gpu": ("inference_gpu", gpu),
    "gpu_settings": ("inference_gpu", gpu_settings),
    "quantised": ("quantised", quantised),
    "input_pipeline": ("input_pipeline", input_pipeline),
    "serve_share": ("serve_cpu", serve_share),
    "serve_load": ("serve_cpu", serve_load),
    "plan": ("plan", plan),
    "plan_compiled": ("plan", plan_compiled),
}
"""Name in a page -> file of results, and what makes a table of it."""

UNMEASURED = {
    "inference_gpu": "Not measured: no GPU was available.",
    "gpu_settings": "Not measured: no GPU was available.",
    "train_gpu": "Not measured: no GPU was available.",
}


def table(name: str) -> str:
    """What a page shows under a name: the numbers, or that there are none yet and how to get them."""
    file, make = TABLES[name]
    path = RESULTS / f"{file}.json"
    if not path.exists():
        said = UNMEASURED.get(name, "Not measured yet.")
        return f"{said} `{COMMANDS[file]}` and `python benchmarks/page_tables.py` fill this in."
    return make(json.loads(path.read_text()))


def filled(text: str) -> str:
    """A page with its tables as they must be."""
    return _TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", text)


def _where(result: dict[str, Any], most: float | None) -> str:
    hardware = result["hardware"]
    on = f"on {hardware['gpu']}" if "gpu" in hardware else f"on an {hardware['cpu']}"
    if "threads" in hardware:
        on = f"on {hardware['threads']} threads of an {hardware['cpu']}"
    on += f" with {hardware['cores']} cores"
    if most is not None:
        on += f" (load {hardware['load_before']:.1f} at the start, up to {most:.1f} behind a row)"
    names = (
        "python",
        "jax",
        "flax",
        "torch",
        "transformers",
        "grain",
        "pillow",
        "tokenizers",
        "fastapi",
        "uvicorn",
        "httpx2",
    )
    return f"{on}; " + ", ".join(f"{name} {hardware[name]}" for name in names if name in hardware)


def _reached(row: dict[str, Any]) -> str:
    for key, unit in (("tokens_per_s", "tokens/s"), ("images_per_s", "pictures/s")):
        if key in row:
            return f"{row[key]:,.1f} {unit}"
    return ""


def _of(row: dict[str, Any]) -> str:
    for key, ceiling in (("share_of_roofline", "bytes"), ("share_of_peak", "matmul")):
        if key in row:
            return f"{row[key]:.0%} of {ceiling}"
    return ""


def main() -> None:
    """Writes the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
