"""The page in a real browser on the real server: `pytest tests/browser` (the extra `browser`, and a Chromium).

One server for all tests, `serve.py` with smol and an API key; a fresh browser context for each. Every test also claims
that nothing went to another origin, that the Content-Security-Policy was not broken and that the console had no error.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.chatting import Chatting

ROOT = Path(__file__).parents[2]
KEY = "key-of-the-browser-tests"
LONGEST_S = 120.0
"""For the server's start with an empty compile cache on a busy machine."""
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True)
class Server:
    """The server under test."""

    address: str

    def metric(self, name: str, labels: str = "") -> float:
        """A sample of `/metrics` under our prefix; `labels` is a part of what stands in its braces."""
        request = urllib.request.Request(
            f"{self.address}/metrics", headers={"Authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            text = response.read().decode()
        pattern = rf"^minigpt4:{name}{{[^}}]*{re.escape(labels)}[^}}]*}} (\S+)$"
        found = re.findall(pattern, text, re.MULTILINE)
        assert len(found) == 1, f"{name} {labels} is {len(found)} times in /metrics"
        return float(found[0])

    def wait_for(self, name: str, value: float, *, labels: str = "") -> None:
        """Waits until a metric has the value. Raises AssertionError after a generous time."""
        deadline = time.monotonic() + 20
        while (now := self.metric(name, labels)) != value:
            assert time.monotonic() < deadline, f"{name} {labels} stays {now}; expected {value}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`serve.py` with smol on a free port, ready. Its output goes to a file: a pipe that nobody reads would fill up."""
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    # The core alone: compiling is what takes time here.
    settings = ["port=0", "num_slots=2", "context=1024", "compile_beside=none"]
    command = [sys.executable, "serve.py", *settings]
    environment = os.environ | {"MINIGPT4_API_KEYS": KEY, "PYTHONPATH": str(ROOT)}
    with (folder.parents[1] / "compiling").open("w") as turn, log.open("wb") as file:
        # One after the other: what the first compiles, the server of a second worker finds in the cache.
        fcntl.flock(turn, fcntl.LOCK_EX)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        address = _wait_until_ready(process, log)
    try:
        yield Server(address)
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert process.returncode == 0, log.read_text()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the server prints."""
    deadline = time.monotonic() + LONGEST_S
    while (found := re.search(r"Ready in .*: (http://\S+)/v1", log.read_text())) is None:
        assert time.monotonic() < deadline, f"not ready after {LONGEST_S} s:\n{log.read_text()}"
        assert process.poll() is None, f"the server ended:\n{log.read_text()}"
        time.sleep(0.1)
    return found.group(1)


def find_chromium() -> str:
    """The browser's path: `MINIGPT4_CHROMIUM`, else `chromium` or `chromium-browser` of the PATH."""
    for name in (os.environ.get("MINIGPT4_CHROMIUM", ""), "chromium", "chromium-browser"):
        if name and (found := shutil.which(name)):
            return found
    raise RuntimeError(
        "No Chromium was found; expected one in the PATH (Debian: apt-get install chromium), or its path in "
        "MINIGPT4_CHROMIUM."
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def chat(server: Server, browser: Browser) -> Iterator[Chatting]:
    """The page on a desktop, with the key; wide and light."""
    chatting = Chatting(browser, server.address, key=KEY)
    chatting.open()
    yield chatting
    chatting.close()


@pytest.fixture
def phone(server: Server, browser: Browser) -> Iterator[Chatting]:
    """The page on a phone in the dark, with the key."""
    chatting = Chatting(
        browser,
        server.address,
        key=KEY,
        viewport={"width": 390, "height": 844},
        has_touch=True,
        is_mobile=True,
        color_scheme="dark",
    )
    chatting.open()
    yield chatting
    chatting.close()
