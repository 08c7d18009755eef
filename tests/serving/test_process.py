"""serve.py as a process of its own, with the smol model: from the command to its exit code."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4_jax import cli
from minigpt4_jax.config_file import load
from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.keys import check_exposure
from tests.serving.running import CHAT, LIMIT_S

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "serve").glob("*.yaml"))


def test_sigterm_in_a_stream_lets_it_finish_and_ends_with_0() -> None:
    command = [sys.executable, "serve.py", "--config", "configs/serve/smol.yaml"]
    settings = ["port=0", "context=128", "num_slots=1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, *settings], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if "Ready in" in line:
                    break
            port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", said[-1])[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
            body = {
                "model": "smol",
                "messages": [{"role": "user", "content": "Hello"}],
                "stream": True,
                "max_tokens": 90,
                "ignore_eos": True,
            }
            connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            next(line for line in response if line.startswith(b"data: {"))  # behind comments
            process.send_signal(signal.SIGTERM)
            rest = response.read()
            connection.close()
            assert rest.rstrip().endswith(b"data: [DONE]")
            assert rest.count(b'"finish_reason":"length"') == 1
            said += process.stderr.readlines()
            assert process.wait(LIMIT_S) == 0, said
        finally:
            process.kill()
    log = "".join(said)
    assert "compiled" in log
    assert "Stopping: what is being answered may take 30 s more." in log
    assert re.search(r"\[[0-9a-f]{32}\] POST /v1/chat/completions 200 ", log)
    assert "Traceback" not in log


# --- the command ---


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_configuration_reads_by_itself_in_at_most_45_lines(file: Path) -> None:
    config = load(ServeConfig, file)
    lines = file.read_text().splitlines()
    assert 15 <= len(lines) <= 45
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("# ")
    assert f"--config configs/serve/{file.name}" in file.read_text()
    check_exposure(config, ("a key",) if config.access.api_keys_file else ())


def test_the_example_for_this_machine_says_the_defaults() -> None:
    assert load(ServeConfig, ROOT / "configs" / "serve" / "smol.yaml") == ServeConfig()


def test_the_merged_configuration_is_printed_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--print-config", "port=8123", "limits.max_n=2"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load(ServeConfig, file) == load(ServeConfig, None, ["port=8123", "limits.max_n=2"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prot=8123"], "unknown key 'prot'. Did you mean 'port'?"),
        (["port=70000"], "port is 70000; expected 0"),
        (["host=0.0.0.0"], "host is '0.0.0.0', which others can reach, and there is no API key"),
        (["access.api_keys_file=/no/such/file"], "which does not exist"),
        (["host=no.such.host.invalid", "access.open_without_key=true"], "which is no address"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minigpt4_jax.cli_serve.set_up_jax", lambda: None)
    monkeypatch.delenv("MINIGPT4_API_KEYS", raising=False)
    assert cli.main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minigpt4: ")
    assert said in err


def test_without_the_extra_the_command_says_how_to_get_it() -> None:
    script = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from minigpt4_jax.cli import main; sys.exit(main(['serve']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "uvicorn is not installed" in line
    assert 'pip install "minigpt4_jax[serve]"' in line
