"""TensorBoard's event files, written as they come.

For: numbers, pictures and texts by step. Not for: what they are (`metrics.py`, `held_out.py`).

tensorboardX's own `SummaryWriter` hands events to a thread through a queue of ten; on a full disk that thread dies and
the eleventh event waits for ever. Here its file format is used and its thread is not: a disk that is full ends the
events, loudly, and never the run.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.config import UserError

EVENTS = "tensorboard"
"""The folder of the event files."""
FLUSH_EVERY_S = 10.0


class Events:
    """Events of one process of a run in `<workdir>/tensorboard`; what an earlier one wrote after `start_step` is
    hidden.

    Raises `UserError` where tensorboardX is not installed.
    """

    def __init__(self, workdir: Path, *, start_step: int) -> None:
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ImportError as error:
            raise UserError(
                "tensorboard is true and the library that writes its files is not installed; expected tensorboardX. "
                "pip install 'minigpt4_jax[train]', or set tensorboard=false."
            ) from error
        self._summary, self._event = summary, Event
        folder = workdir / EVENTS
        folder.mkdir(exist_ok=True)
        # The name of a file has only the second in it: the step keeps two quick runs apart.
        self._writer = EventsWriter(str(folder / "events"), f".{start_step}")
        self._flushed = time.monotonic()
        self._write(
            Event(
                step=start_step + 1, session_log=SessionLog(status=SessionLog.SessionStatus.START)
            )
        )

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number."""
        self._add(self._summary.scalar(name, value), step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """`pixels`: uint8 `[H, W, 3]`."""
        self._add(self._summary.image(name, pixels, dataformats="HWC"), step)

    def text(self, name: str, text: str, step: int) -> None:
        """Markdown."""
        self._add(self._summary.text(name, text), step)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._stopping(self._writer.close)

    def _add(self, summary: Any, step: int) -> None:
        self._write(self._event(step=step, wall_time=time.time(), summary=summary))

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        self._stopping(lambda: self._writer.write_event(event))
        now = time.monotonic()
        if self._writer is not None and now - self._flushed >= FLUSH_EVERY_S:
            self._flushed = now
            self._stopping(self._writer.flush)

    def _stopping(self, write: Any) -> None:
        """A file with half an event in it cannot be gone on with."""
        try:
            write()
        except OSError as error:
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                writer.close()
            print(
                f"TensorBoard events end here ({error.strerror or error}); metrics.jsonl goes on, and a restart "
                "begins new events.",
                flush=True,
            )
