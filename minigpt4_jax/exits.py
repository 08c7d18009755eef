"""How a command ends: 0, or one message and another code; never a traceback for what a user can mend.

For: `minigpt4`, `train.py`, `serve.py`, `python -m convert`. Not for: finding problems (everything that finds one
raises `UserError`), and not for mistakes in this project, which keep their traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from minigpt4_jax.config import UserError

PROBLEM = 2
ENGINE_FAILED = 70
"""A server gave its engine up: faults again and again, or it hangs. Start it anew (EX_SOFTWARE of sysexits.h)."""
PREEMPTED = 75
"""After SIGTERM, everything saved: run me again (EX_TEMPFAIL of sysexits.h). What a scheduler should start anew."""
PEER_LOST = 76
"""Another process of the same run died, fell silent or never came: run me again (EX_PROTOCOL of sysexits.h)."""
INTERRUPTED = 130
"""After Ctrl-C, as shells expect it (128 + SIGINT)."""
BROKEN_PIPE = 141
"""The reader of the output went away (128 + SIGPIPE)."""


class Stopped(KeyboardInterrupt):
    """A signal ended a training run between two steps, and all of it is saved."""

    def __init__(self, code: int, step: int) -> None:
        super().__init__(f"after step {step}")
        self.code = code
        """`INTERRUPTED` or `PREEMPTED`."""
        self.step = step


class PeerLost(UserError):
    """A process cannot go on without another one of its run."""


def end_process(code: int) -> NoReturn:
    """Ends this process now, whatever its threads do; what was logged and printed is out.

    For one that may leave a thread inside the device: the end of the interpreter would wait for it (pools) or pull
    Python away from under it (daemons), which XLA answers with SIGABRT in place of the exit code.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)


def run_command(command: Callable[[], int], *, say: Callable[[str], None]) -> int:
    """Runs `command` and returns its exit code; a problem goes to `say` as one message.

    Errors of the operating system that were not met on the way (a full disk, a place without permission) end here too.
    """
    try:
        return command()
    except UserError as error:
        say(str(error))
        return PEER_LOST if isinstance(error, PeerLost) else PROBLEM
    except Stopped as error:
        print(f"\nStopped {error}; the same command goes on there.", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at its end; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno is None:  # not from the operating system
            raise
        say(explain(error))
        return PROBLEM


def explain(error: OSError) -> str:
    """An error of the operating system with what to do about it."""
    where = repr(error.filename) if error.filename is not None else "A file"
    text = f"{where}: {error.strerror or os.strerror(error.errno or 0)}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{text} The disk is full; expected room to write. Free some space or choose another place (workdir, "
            "--out, MINIGPT4_CACHE), and run the command again; a training run goes on where its last checkpoint is."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{text} Expected a place that you may use; choose another one (workdir, --out, MINIGPT4_CACHE), or mend "
            "the permissions."
        )
    return f"{text} Expected a path that can be read or written; check it and the disk, and run the command again."
