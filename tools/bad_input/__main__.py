"""Runs every bad input through the commands and writes what they say: `docs/bad_input.md`.

    python tools/bad_input [--only TEXT]     (with --only: prints, writes nothing)

Each case is prepared in an empty folder and given to the `main` of its command in a process of its own (forked, so that
sixty cases do not import NumPy sixty times); exit code and output are what a shell would see. Training and damaged
caches run on the `tiny` model with weights of zero in place of the fetched ones; nothing is downloaded. A full and a
read-only disk are a small tmpfs, which needs root; without root these two cases cannot be run and the script stops.
It stops too when a case ends in another way than its line here says: the page is a record, not a wish.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from captions import CAPTIONS
from case import Case
from pictures import PICTURES
from settings import SETTINGS
from weights import PLACES, WEIGHTS

from minigpt4_jax.data.images import load_image, preprocess

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad_input.md"
CASES: tuple[Case, ...] = (*PICTURES, *CAPTIONS, *SETTINGS, *WEIGHTS, *PLACES)
LIMIT_S = 300


def run_command(command: tuple[str, ...]) -> int:
    """The `main` that the shell would start, or `load_image`."""
    program, *arguments = command
    if program == "load_image":
        image = load_image(arguments[0])
        values = preprocess(image, size=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        colour = ", ".join(str(round(float(v) * 255)) for v in values[0, 0])
        print(f"RGB, {image.width} x {image.height}, first pixel of the resized picture ({colour})")
        return 0
    if program == "python -m convert":
        from convert.__main__ import main as convert_main

        return convert_main(arguments)
    from minigpt4_jax.cli import main as cli_main

    return cli_main(["train", *arguments] if program == "train.py" else arguments)


def child(case: Case, folder: str, output: str) -> None:
    """Prepares, becomes the command and ends with its exit code; what it prints goes into the file `output`."""
    os.setpgrp()  # Ctrl-C goes to a whole group, pip included
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.update(case.environment)
    # Orbax warns through absl when a save took long: that is this machine's disk, not the input.
    logging.getLogger("absl").setLevel(logging.ERROR)
    code = 1
    try:
        case.prepare()
        out = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
            os.dup2(file, number)
        case.patch()
        code = run_command(case.command)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(case: Case, scratch: Path) -> tuple[int, str]:
    """Runs one case in a folder of its own; returns exit code and message."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    folder.chmod(0o755)
    output = folder.with_suffix(".txt")
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(case, str(folder), str(output))
    )
    process.start()
    assert process.pid is not None
    if case.interrupt_at:
        deadline = time.monotonic() + LIMIT_S
        while not (folder / case.interrupt_at).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
    process.join(LIMIT_S)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    for mounted in (folder / "disk", folder / "cache"):
        if os.path.ismount(mounted):
            subprocess.run(["umount", "-l", str(mounted)], check=True)
    text = output.read_text(errors="backslashreplace") if output.exists() else ""
    return process.exitcode or 0, message(text.replace(f"{folder}/", "").replace(str(folder), "."))


def message(text: str) -> str:
    """What a command says at its end, without the progress before it (pip's own lines)."""
    lines = text.replace("\r", "\n").strip().splitlines()
    starts = [n for n, line in enumerate(lines) if re.match("minigpt4: |error: |Traceback", line)]
    return "\n".join(line.rstrip() for line in lines[starts[0] if starts else 0 :])


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    for plain, escaped in (
        ("\\", "\\\\"),
        ("|", "\\|"),
        ("<", "&lt;"),
        ("*", "\\*"),
        ("_", "\\_"),
        ("\n", "<br>"),
    ):
        shown = shown.replace(plain, escaped)
    return shown


def row(case: Case, code: int, said: str) -> str:
    """One line of the page."""
    command = cell(shlex.join(case.command[1:]).replace("\n", "\\n"))
    program = case.command[0] if case.command[0] != "load_image" else "load\\_image"
    return f"| {cell(case.what)} | {program} {command} | {code} | {cell(said)} |"


INTRODUCTION = """# Bad input, and what it is answered with

Written by `python tools/bad_input`, which runs every case; do not edit. Exit codes: 0 done, 2 a problem that
the user can mend (one message), 130 after Ctrl-C. A refused picture is refused before any weights are loaded.
"""


def write_page(results: list[tuple[Case, int, str]]) -> None:
    """Writes the page beside its place, then renames it."""
    lines = [INTRODUCTION]
    for group in dict.fromkeys(case.group for case in CASES):
        lines += [f"## {group}\n", "| input | command | exit code | message |", "|---|---|---|---|"]
        lines += [row(case, code, said) for case, code, said in results if case.group == group]
        lines.append("")
    partial = PAGE.with_suffix(".partial")
    partial.write_text("\n".join(lines))
    partial.replace(PAGE)


def main() -> None:
    """Runs the cases; writes the page when all of them ended as they should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases with TEXT in their description"
    )
    only = parser.parse_args().only
    if os.geteuid() != 0:
        raise SystemExit(
            "A full and a read-only disk are made with mount, which needs root; run this as root."
        )
    warnings.filterwarnings("ignore", message=".*os.fork.*", category=RuntimeWarning)
    import convert.__main__  # noqa: F401  (once, before the forks)
    import minigpt4_jax.api
    import minigpt4_jax.training.loop  # noqa: F401  (likewise)

    results, wrong = [], []
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        for case in (c for c in CASES if only in c.what):
            code, said = run(case, Path(scratch))
            results.append((case, code, said))
            right = (
                code == case.code and re.search(case.says, said, re.S) and "Traceback" not in said
            )
            print(
                f"{'ok   ' if right else 'WRONG'} {case.group}: {case.what}: {code}\n      {said}",
                flush=True,
            )
            if not right:
                wrong.append(case.what)
    if wrong:
        raise SystemExit(
            f"{len(wrong)} of {len(results)} ended otherwise: {', '.join(wrong)}. Nothing was written."
        )
    if not only:
        write_page(results)


if __name__ == "__main__":
    main()
