"""The file that captions go to: whole at any moment, taken up again where it ends, and never of two minds.

For: rows appended one by one, what a run depends on in `OUT.meta.json` beside them, and an earlier run's rows. Not for:
what is captioned (`caption.py`). The form of a row is written there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minigpt4_jax.config import UserError

Name = tuple[str, str | None]
"""By which a row is found again: the picture, as its row has it, and its own prompt, if it has one."""
VERSION = 1
"""Of the file's form."""


class CaptionFile:
    """The rows of a run, in a file that is whole at any moment. A context manager; one process at a time.

    Opening it makes the file and `OUT.meta.json` (so that a full disk or a place without permission is said before any
    work), or takes up the rows of an earlier run.

    Args:
        settings: what captions depend on, JSON-like; a file with rows made with others is refused.
        retry_errors: drop the rows of pictures that could not be captioned, so that they are tried again.

    Raises:
        UserError: the file is another run's, is used by one right now, or is no file of captions.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, retry_errors: bool = False
    ) -> None:
        self.path, self.meta_path = path, path.with_name(f"{path.name}.meta.json")
        self._settings = {"version": VERSION, **settings}
        self.rows: dict[Name, bool] = {}
        """Pictures that have a row; whether it is an error."""
        self.mended: list[str] = []
        """What was changed in the file of an earlier run, in sentences."""
        self._file = self._open()
        try:
            self._take_up(retry_errors=retry_errors)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def errors(self) -> int:
        """Rows that say why there is no caption."""
        return sum(self.rows.values())

    def set_model(self, fingerprint: str) -> None:
        """Binds the file to a model. Raises `UserError` if its rows are another model's."""
        before = self._read_meta() if self.rows else {}
        if before.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"{self.path} was made with other weights of the model {before.get('model')!r} (its files, projection "
                "or dtype changed). Go on with the same ones, or choose another --out."
            )
        self._write_meta({**self._settings, "fingerprint": fingerprint})

    def write(self, name: Name, result: Mapping[str, Any]) -> None:
        """Appends a row and hands it to the system: whole, or not at all. `result` is what it says of the picture."""
        image, prompt = name
        row = {"image": image, **({} if prompt is None else {"prompt": prompt}), **result}
        try:
            line = json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8
            line = json.dumps(row).encode()
        start = os.fstat(self._file).st_size
        try:
            _write_all(self._file, line + b"\n")
        except BaseException as error:  # also Ctrl-C; a torn row is no row
            os.ftruncate(self._file, start)
            if isinstance(error, OSError):
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error
            raise
        self.rows[name] = "error" in result

    def close(self) -> None:
        """Lets the file go."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> int:
        """The file, made if need be and held: the descriptor."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise UserError(
                f"{self.path} is being written by another run. Wait for it, or choose another --out."
            ) from error
        return file

    def _take_up(self, *, retry_errors: bool) -> None:
        content = self.path.read_bytes()
        if not content:
            self._write_meta(self._settings)
            return
        self._compare(self._read_meta())
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)
            self.mended.append(
                f"The last line of {self.path} was cut off ({len(content) - whole} bytes), as by a kill in the middle "
                "of writing: it was removed, and its picture is captioned again."
            )
        lines = content[:whole].splitlines()
        names = [_parse_row(line, self.path, number) for number, line in enumerate(lines, start=1)]
        failed = sum(is_error for _, is_error in names)
        if retry_errors and failed:
            self._keep(
                line for line, (_, is_error) in zip(lines, names, strict=True) if not is_error
            )
            names = [(name, is_error) for name, is_error in names if not is_error]
            self.mended.append(f"{failed} rows with errors were removed: they are tried again.")
        self.rows = dict(names)

    def _keep(self, lines: Iterable[bytes]) -> None:
        """Replaces the file by one with these lines."""
        _replace(self.path, b"".join(line + b"\n" for line in lines))
        self.close()
        self._file = self._open()

    def _read_meta(self) -> dict[str, Any]:
        try:
            meta = json.loads(self.meta_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} has rows, but {self.meta_path.name}, which says how they were made, cannot be read "
                f"({error}). Choose another --out, or remove the file to begin again."
            ) from error
        if not isinstance(meta, dict):
            raise UserError(f"{self.meta_path} is {meta!r}; expected an object. Remove both files.")
        return meta

    def _compare(self, before: Mapping[str, Any]) -> None:
        changed = [
            f"{key} was {before.get(key)!r}, is {value!r}"
            for key, value in self._settings.items()
            if before.get(key) != value
        ]
        if changed:
            raise UserError(
                f"{self.path} was begun with other settings: {'; '.join(changed)}. Go on with the same ones, or choose "
                "another --out."
            )

    def _write_meta(self, meta: Mapping[str, Any]) -> None:
        _replace(self.meta_path, (json.dumps(meta, indent=1) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """Writes beside, then renames. An error names the file, and nothing is left behind."""
    beside = path.with_name(f"{path.name}.part")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _parse_row(line: bytes, path: Path, number: int) -> tuple[Name, bool]:
    """Name of a row's picture, and whether it is an error."""
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("image"), str):
            return (row["image"], row.get("prompt")), "error" in row
    raise UserError(
        f"Line {number} of {path} is no row of captions: {line[:80]!r}. Mend or remove it, or choose another --out."
    )
