"""benchmarks/server_process.py: what a server is started with, and how its metrics are read."""

from __future__ import annotations

import io
import sys

import pytest

from minigpt4_jax.serve_config import KEYS_VARIABLE
from tests.benchmark_scripts import load_script

server_process = load_script("server_process")


def test_a_server_is_started_without_our_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "a-key-0123456789ab")
    script = f"import os, sys; sys.exit({KEYS_VARIABLE!r} in os.environ)"
    with server_process.ServerProcess(launcher=[sys.executable, "-c", script]) as started:
        assert started.process.wait(timeout=120) == 0


def test_metrics_are_summed_over_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "# HELP minigpt4:request_success_total x\n"
        'minigpt4:request_success_total{engine="0",finished_reason="stop"} 3.0\n'
        'minigpt4:request_success_total{engine="0",finished_reason="abort"} 2.0\n'
        "process_open_fds 12.0\n"
    )
    monkeypatch.setattr(
        server_process.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(text.encode())
    )
    found = server_process.read_metrics("http://x")
    assert found == {"request_success_total": 5.0, "process_open_fds": 12.0}
