"""The launch recipes of training: settings exist, the YAML parses, the scripts are sound shell, the codes are ours.

Not for: whether a cluster takes them; nobody could run them here. The server has `test_deploy_serve.py`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4_jax import exits
from minigpt4_jax.config_file import load
from minigpt4_jax.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
MANIFESTS = sorted((ROOT / "deploy" / "gke").glob("*.yaml"))
SCRIPTS = sorted([*(ROOT / "deploy").rglob("*.sh"), *(ROOT / "deploy").rglob("*.sbatch")])
PAGE = ROOT / "docs" / "training.md"
VARIABLES = {"$MODEL": "m", "$WORKDIR": "w", "$DATA": "/shared/data", "$JOB_COMPLETION_INDEX": "0"}


def commands(text: str) -> list[list[str]]:
    """The words behind each `train.py` of a shell text, variables filled in."""
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    text = text.replace("\\\n", " ")
    lines = re.findall(r"train\.py( [^\n]*--config[^\n]*)", text)
    return [shlex.split(line.rstrip('"')) for line in lines]


def require_settings(words: list[str]) -> None:
    """Loads the configuration that a command line names, with its overrides; they say where the data lies."""
    joined = " ".join(words).replace("--config=", "--config ").split()
    at = joined.index("--config")
    config = load(TrainConfig, ROOT / joined[at + 1], joined[:at] + joined[at + 2 :])
    assert config.model
    assert config.workdir
    published = load(TrainConfig, ROOT / joined[at + 1], []).data.all_sources()
    for name, source in config.data.all_sources().items():
        assert source.path not in ("", published[name].path), f"{name}: {source.path!r}"


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (found,) = pod["containers"]
    return dict(found)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_a_manifest_parses_and_its_settings_exist(file: Path) -> None:
    manifest = yaml.safe_load(file.read_text())
    assert manifest["kind"] == "JobSet"
    command = container(manifest)["command"]
    text = command[-1] if command[0] == "bash" else shlex.join(command[1:])
    (words,) = commands(text)
    require_settings(words)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    counts = [w.partition("=")[2] for w in words if w.startswith("distributed.num_processes")]
    assert counts in ([], [str(job["completions"])])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, exits.PROBLEM]
    assert rule["onExitCodes"]["containerName"] == container(manifest)["name"]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_a_script_is_sound_and_its_settings_exist(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    found = commands(text)
    assert len(found) == (file.name != "again.sh")
    for words in found:
        require_settings(words)
    if "case $code" in text:
        assert f"0 | 1 | {exits.PROBLEM} | {exits.INTERRUPTED})" in text


def test_the_page_has_every_file_every_code_and_settings_that_exist() -> None:
    text = PAGE.read_text()
    for file in (*MANIFESTS, *SCRIPTS):
        assert f"(../{file.relative_to(ROOT)})" in text
    found = commands("\n".join(re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)))
    assert found
    for words in found:
        require_settings(words)
    codes = (exits.PROBLEM, exits.PREEMPTED, exits.PEER_LOST, exits.INTERRUPTED)
    assert all(f"\n| {code} |" in text for code in codes)


@pytest.mark.parametrize(
    ("code", "times"), [(0, 1), (exits.PROBLEM, 1), (exits.PREEMPTED, 3), (exits.PEER_LOST, 3)]
)
def test_again_repeats_what_can_go_on(code: int, times: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (ROOT / "deploy" / "again.sh").read_text().replace("sleep 5", "")
    command = ["bash", "-c", script, "again", "bash", "-c", f"echo x >> {log}; exit {code}"]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", "ATTEMPTS": "3"}, check=False)
    assert done.returncode == code
    assert log.read_text().count("x") == times
