"""The programs as people start them from a shell: help, exit codes, `train.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_convert_shows_its_own_help() -> None:
    found, expected = run("minigpt4_jax.cli", "convert", "--help"), run("convert", "--help")
    assert found.returncode == expected.returncode == 0
    assert "usage: " in found.stdout
    assert found.stdout.splitlines()[1:] == expected.stdout.splitlines()[1:]


def test_a_mistake_in_the_shell_is_one_line_and_exit_code_2() -> None:
    done = run("minigpt4_jax.cli", "chat", "nowhere.png", "Hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minigpt4: There is no picture at 'nowhere.png'")
    assert len(done.stderr.splitlines()) == 1


def test_no_command_shows_what_there_is() -> None:
    done = run("minigpt4_jax.cli")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: minigpt4")


def test_train_py_is_the_train_command() -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--config", "no.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("minigpt4: There is no configuration file 'no.yaml'; expected")
    assert len(done.stderr.splitlines()) == 1
