"""exits.py: every end of a command has its code and its message; a mistake of ours keeps its traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.exits import (
    BROKEN_PIPE,
    INTERRUPTED,
    PEER_LOST,
    PREEMPTED,
    PROBLEM,
    PeerLost,
    Stopped,
    run_command,
)

ROOT = Path(__file__).parents[1]


def end_with(error: BaseException) -> tuple[int, list[str]]:
    said: list[str] = []

    def command() -> int:
        raise error

    return run_command(command, say=said.append), said


def test_a_command_that_ends_well_keeps_its_code() -> None:
    assert run_command(lambda: 0, say=print) == 0


def test_a_problem_is_said_once() -> None:
    assert end_with(UserError("x is 3; expected 4.")) == (PROBLEM, ["x is 3; expected 4."])


@pytest.mark.parametrize(
    ("number", "expected", "to_do"),
    [
        (errno.ENOSPC, "expected room to write", "Free some space"),
        (errno.EDQUOT, "expected room to write", "Free some space"),
        (errno.EACCES, "Expected a place that you may use", "mend the permissions"),
        (errno.EROFS, "Expected a place that you may use", "choose another one"),
        (errno.EIO, "Expected a path that can be read or written", "check it and the disk"),
    ],
)
def test_an_error_of_the_system_gives_value_expectation_and_what_to_do(
    number: int, expected: str, to_do: str
) -> None:
    code, (said,) = end_with(OSError(number, os.strerror(number), "runs/a"))
    assert code == PROBLEM
    assert said.startswith(f"'runs/a': {os.strerror(number)}.")
    assert expected in said
    assert to_do in said


@pytest.mark.parametrize("error", [OSError("no number"), ValueError("ours"), KeyError("ours")])
def test_a_mistake_of_this_project_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        end_with(error)


def test_ctrl_c_ends_as_shells_expect(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_with(KeyboardInterrupt()) == (INTERRUPTED, [])
    assert capsys.readouterr().err == "\nStopped.\n"


def test_a_stopped_run_says_where_and_a_scheduler_can_tell_it_from_a_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert end_with(Stopped(PREEMPTED, 7)) == (75, [])
    assert capsys.readouterr().err == "\nStopped after step 7; the same command goes on there.\n"
    assert end_with(PeerLost("Another one died.")) == (PEER_LOST, ["Another one died."])
    assert len({0, 1, PROBLEM, PREEMPTED, PEER_LOST, INTERRUPTED, BROKEN_PIPE}) == 7


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits an ignored one
from minigpt4_jax.exits import run_command
def command():
    print("begun", flush=True)
    {body}
    return 0
sys.exit(run_command(command, say=print))
"""


def start(body: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    body = "time.sleep(0.5)\n    for _ in range(9): print('x' * 99999, flush=True)"
    with start(body) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == BROKEN_PIPE


def test_ctrl_c_in_a_real_process_is_one_word_and_130() -> None:
    with start("time.sleep(60)") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"\nStopped.\n"
    assert process.returncode == INTERRUPTED


BUSY = """
import logging, sys, threading
import jax, jax.numpy as jnp
from minigpt4_jax.exits import end_process
logging.basicConfig()
begun, go_on = threading.Event(), jax.jit(lambda x: x @ x / 700)
def work():
    x = jnp.ones((700, 700))
    while True:
        x = go_on(x).block_until_ready()
        begun.set()
threading.Thread(target=work, daemon=True).start()
begun.wait()
print("printed, in a buffer")
logging.warning("logged")
end_process(130)
"""


def test_a_process_that_ends_with_a_thread_in_the_device_keeps_its_code_and_its_words() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", BUSY], cwd=ROOT, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == INTERRUPTED, done.stderr
    assert done.stdout == b"printed, in a buffer\n"
    assert done.stderr.endswith(b"logged\n")
