"""A real server in a process of its own, for who measures it or ill-treats it: started, waited for, asked, ended.

For: `serve_load.py`, `tools/serve_faults.py`, `tools/serve_soak.py`. Not for: requests (`serve_client.py`). Standard
library only, and nothing of this folder, so that `tools/` can import it too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "serve" / "smol.yaml"
SERVE = (sys.executable, str(ROOT / "serve.py"))
KEYS_VARIABLE = "MINIGPT4_API_KEYS"
"""As in `minigpt4_jax/serve_config.py`."""
READY_S = 600.0
"""Longest wait for `/ready`: an empty compile cache on two busy cores."""
STOP_S = 120.0
_ADDRESS = re.compile(r"http://[\w.\-\[\]:]+:(\d+)")
_SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")


class ServerProcess:
    """`serve.py` on a free port of this machine. A context manager: what still runs at its end is killed.

    It is on the loopback, and the keys of our own environment are not given to it: whoever starts it may ask it.

    Args:
        config: of the server; None takes the smol model's.
        overrides: `key=value` of `ServeConfig`; the port is added.
        launcher: the words before `--config`; `python serve.py` where there are none.
    """

    def __init__(
        self,
        overrides: Sequence[str] = (),
        *,
        config: Path | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        command = [*(launcher or SERVE), "--config", str((config or CONFIG).absolute())]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log", prefix="serve-")  # noqa: SIM115  # closed in __exit__
        inherited = {name: value for name, value in os.environ.items() if name != KEYS_VARIABLE}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [*command, *overrides, "port=0"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**inherited, "PYTHONPATH": paths},
        )
        self.url = ""
        """Such as `http://127.0.0.1:43210`; known after `wait_until_ready`."""

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.alive:
            self.process.kill()
        self.process.wait()
        self._log.close()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def said(self) -> str:
        """Everything that it printed so far."""
        return Path(self._log.name).read_text()

    def wait_until_ready(self) -> float:
        """Returns the seconds until `/ready` said so. Ends the program if the server ended before, or never is."""
        start = time.monotonic()
        while time.monotonic() < start + READY_S:
            if not self.alive:
                raise SystemExit(
                    f"The server ended with code {self.process.returncode} before it was ready:\n{self.said()[-3000:]}"
                )
            found = _ADDRESS.search(self.said())
            if found:
                self.url = f"http://127.0.0.1:{found[1]}"
                if status(f"{self.url}/ready") == 200:
                    return time.monotonic() - start
            time.sleep(0.1)
        raise SystemExit(f"The server was not ready within {READY_S:.0f} s:\n{self.said()[-3000:]}")

    def stop(self) -> int:
        """SIGTERM, and the code that it ended with."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_S)


def status(url: str) -> int:
    """Of a GET; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0


def _get(url: str, key: str) -> bytes:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=30
    ) as response:
        body: bytes = response.read()
        return body


def read_json(url: str, *, key: str = "") -> Any:
    """The body of a GET, with an API key where the server wants one."""
    return json.loads(_get(url, key))


def read_metrics(url: str, *, key: str = "") -> dict[str, float]:
    """What `/metrics` says: name, without our prefix, to the sum over its labels (model, engine and others)."""
    text = _get(f"{url}/metrics", key).decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample:
            name = sample["name"].removeprefix("minigpt4:")
            found[name] = found.get(name, 0.0) + float(sample["value"])
    return found


def wait_until(reached: Callable[[], bool], *, limit_s: float) -> bool:
    """Looks ten times a second; whether it was reached in time."""
    end = time.monotonic() + limit_s
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def wait_until_compiled(url: str, *, key: str = "", limit_s: float = 900.0) -> None:
    """Returns when nothing that is wanted so far is left to compile beside requests. Ends the program after
    `limit_s`."""

    def done() -> bool:
        return not read_metrics(url, key=key).get("compile_pending", 0.0)

    if not wait_until(done, limit_s=limit_s):
        raise SystemExit(f"The server still compiles after {limit_s:.0f} s.")
