"""How long a user waits: seconds from the command to the first word, cold and warm, and tokens per second after it.

    python benchmarks/first_word.py --picture examples/coffee.jpg [--out FILE.json]

Cold is an empty cache: fetching through pip, converting, compiling. Warm is every later call. Both run the installed
`minigpt4` command in a process of its own and read its output character by character. These are seconds on one machine
with its network and its load, to know the order of magnitude; they are no measure against anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minigpt4_jax import MiniGPT4

QUESTION = "What is this?"
LONG_QUESTION = "Write a short story about it."


def first_word(picture: Path, environment: dict[str, str]) -> tuple[float, float, str]:
    """Runs the command; returns seconds to the first character, seconds to the end, and what it printed."""
    command = [sys.executable, "-m", "minigpt4_jax.cli", "chat", str(picture), QUESTION]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        rest = process.stdout.read()
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}.")
    return seconds, time.perf_counter() - start, (first + rest).decode().strip()


def tokens_per_second(picture: Path) -> float:
    """Steady writing of one answer: the median of three, each counted from its first piece of text."""
    model = MiniGPT4.load("smol")
    rates = []
    for _ in range(4):
        chat = model.start_chat()
        chat.add_image(picture)
        pieces = chat.stream(LONG_QUESTION)
        next(pieces)
        start = time.perf_counter()
        rest = "".join(pieces)
        rates.append(len(model.tokenizer.encode(rest)) / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def main() -> None:
    """Runs the benchmark; prints the rows and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3, help="warm runs (the median is reported)")
    parser.add_argument("--skip-cold", action="store_true", help="do not fetch into an empty cache")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, object] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as empty:
        environment = dict(os.environ)
        if not args.skip_cold:
            environment["MINIGPT4_CACHE"] = empty
            result["cold_first_word_s"] = round(first_word(args.picture, environment)[0], 1)
        warm = [first_word(args.picture, environment) for _ in range(args.runs + args.skip_cold)]
        warm = warm[args.skip_cold :]  # without a cold run, the first may still compile
    result["warm_first_word_s"] = round(statistics.median(row[0] for row in warm), 2)
    result["warm_whole_command_s"] = round(statistics.median(row[1] for row in warm), 2)
    result["answer"] = warm[-1][2]
    result["tokens_per_s"] = round(tokens_per_second(args.picture), 1)
    for name, value in result.items():
        print(f"{name:22} {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
