"""A file that grows by lines, and loses none of them while its disk is full.

For: the metrics of a run, which must not end it because a row cannot be written.
Not for: files that are written once (beside, then renamed).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


class LineFile:
    """Appends to `path`; what the disk refuses is kept in memory and written as soon as it takes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._unwritten = b""
        self._told = False

    def write(self, line: str) -> None:
        """Adds `line` and its line break."""
        self._unwritten += line.encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
            self._told = False
        except OSError as error:
            if not self._told:
                _log.warning(
                    "%s cannot be written (%s): its lines are kept in memory until it can.",
                    self._path,
                    error.strerror,
                )
            self._told = True

    def close(self) -> None:
        """Tries a last time; the log says how many lines are lost, if any are. Safe to call twice."""
        if self._fd < 0:
            return
        self._flush()
        os.close(self._fd)
        self._fd = -1
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            _log.error("%s: its last %d lines could not be written.", self._path, lost)
