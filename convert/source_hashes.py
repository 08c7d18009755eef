"""SHA-256 of the files of a conversion, read beside the conversion and not ahead of it.

For: `model.py`, whose manifest says which files weights came from. The files are larger than memory; hashed at its own
speed a file would be read from the disk twice, and a conversion that waits for the disk would take half as long again.
So the hashes keep behind the share of the model that is converted.
Not for: comparing hashes (`fetch.py`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 16 << 20  # bytes
_AHEAD = 0.02  # share that may be read ahead


class SourceHashes:
    """Hashes files in a thread. Use as a context: leaving it ends the thread, whether it is done or not.

    Args:
        files: by part of the model, in the order that they are converted in.
    """

    def __init__(self, files: Mapping[str, Sequence[Path]]) -> None:
        self._files = files
        self._total = max(1, sum(f.stat().st_size for part in files.values() for f in part))
        self._read = 0
        self._share = 0.0
        self._stopped = False
        self._moved = threading.Condition()
        self._found: dict[str, list[dict[str, Any]]] = {part: [] for part in files}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SourceHashes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify()
        self._thread.join()

    def allow(self, share: float) -> None:
        """The conversion has come so far, 0 to 1."""
        with self._moved:
            self._share = share
            self._moved.notify()

    def wait(self) -> dict[str, list[dict[str, Any]]]:
        """By part, name, size and SHA-256 of every file.

        Raises:
            OSError: a file could not be read.
        """
        self.allow(1.0)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            for part, files in self._files.items():
                for file in files:
                    digest = self._hash(file)
                    if digest is None:
                        return
                    size = file.stat().st_size
                    entry = {"name": file.name, "bytes": size, "sha256": digest}
                    self._found[part].append(entry)
        except OSError as error:
            self._error = error

    def _hash(self, file: Path) -> str | None:
        """None where the conversion has ended before the file did."""
        digest = hashlib.sha256()
        with file.open("rb") as f:
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
                self._read += len(chunk)
                with self._moved:
                    self._moved.wait_for(
                        lambda: self._stopped or self._read <= (self._share + _AHEAD) * self._total
                    )
                    if self._stopped:
                        return None
        return digest.hexdigest()
