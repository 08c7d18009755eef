"""deploy/serve: the settings exist, the probes ask routes that exist, nothing runs as root, times and paths agree.

Not for: whether Docker builds it or a cluster takes it; neither was there.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4_jax.config_file import load
from minigpt4_jax.serve_config import ServeConfig

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "serve"
OPEN_ROUTES = {"/health", "/ready"}
"""What answers without a key."""


@pytest.fixture(scope="module")
def image() -> dict[str, list[str]]:
    """The instructions of the Dockerfile: name -> what stands behind it, each time."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest.strip())
    return found


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return found


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def config(image: dict[str, list[str]], container: dict[str, Any]) -> ServeConfig:
    """What the container's command line says."""
    python, script, option, path, *overrides = json.loads(image["ENTRYPOINT"][0])
    assert [python, script, option] == ["python", "serve.py", "--config"]
    assert (ROOT / script).exists()
    return load(ServeConfig, ROOT / path, [*overrides, *container["args"]])


def test_the_image_has_a_pinned_base_no_root_and_no_secret(image: dict[str, list[str]]) -> None:
    (base,) = image["FROM"]
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", base)
    assert image["USER"] == ["10001"]
    settings = " ".join(image["ENV"] + image.get("ARG", []))
    assert not re.search(r"key|token|secret|password", settings, re.IGNORECASE)
    names = shlex.split(image["ARG"][0].partition("=")[2])[0].split(",")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"serve", "smol"} == set(names) <= set(extras)


def test_the_image_gets_what_it_copies_and_nothing_else(image: dict[str, list[str]]) -> None:
    copied = {word for line in image["COPY"] for word in line.split()[:-1]}
    let_through = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert let_through[0] == "*"
    assert {line[1:] for line in let_through if line.startswith("!")} == copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_server_in_the_image_listens_to_others_on_the_port_that_is_told(
    config: ServeConfig, image: dict[str, list[str]], container: dict[str, Any]
) -> None:
    assert not config.loopback
    assert image["EXPOSE"] == [str(config.port)]
    (port,) = container["ports"]
    assert port["containerPort"] == config.port
    assert f"127.0.0.1:{config.port}/health" in image["HEALTHCHECK"][0]


def test_the_probes_ask_routes_that_answer_without_a_key(container: dict[str, Any]) -> None:
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert set(paths.values()) == OPEN_ROUTES
    ports = {container[f"{name}Probe"]["httpGet"]["port"] for name in paths}
    assert ports == {container["ports"][0]["name"]}


def test_a_stop_leaves_time_to_drain(pod: dict[str, Any], config: ServeConfig) -> None:
    assert pod["terminationGracePeriodSeconds"] >= config.faults.drain_s + 15
    assert "lifecycle" not in pod["containers"][0]


def test_a_slow_answer_is_not_taken_for_a_dead_server(
    container: dict[str, Any], config: ServeConfig
) -> None:
    """The server's own watchdog knows better than a probe, and comes first."""
    probe = container["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= config.faults.stall_s


def test_the_keys_come_from_a_secret_and_the_server_reads_them_there(
    pod: dict[str, Any], container: dict[str, Any], config: ServeConfig, manifests: dict[str, Any]
) -> None:
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    file = Path(config.access.api_keys_file)
    assert str(file.parent) == mounts["keys"]["mountPath"]
    assert "secret" in volumes["keys"]
    text = (FOLDER / "kubernetes.yaml").read_text()
    assert f"--from-file={file.name}=" in text
    assert f"generic {volumes['keys']['secret']['secretName']} " in text
    assert "Secret" not in manifests, "a key that is written down here is known to everybody"
    assert not config.access.open_without_key


def test_nothing_in_the_pod_has_rights_or_can_be_written_but_its_volumes(
    pod: dict[str, Any], container: dict[str, Any], image: dict[str, list[str]]
) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert str(pod["securityContext"]["runAsUser"]) == image["USER"][0]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    settings = dict(word.split("=", 1) for word in shlex.split(image["ENV"][0]))
    writable = {
        mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
    }
    assert writable == {settings["MINIGPT4_CACHE"], settings["HOME"]}
    assert image["VOLUME"] == [settings["MINIGPT4_CACHE"]]


def test_the_service_finds_the_pods(manifests: dict[str, Any], container: dict[str, Any]) -> None:
    service, deployment = manifests["Service"]["spec"], manifests["Deployment"]["spec"]
    assert service["selector"] == deployment["selector"]["matchLabels"]
    assert service["selector"] == deployment["template"]["metadata"]["labels"]
    assert service["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert service["type"] == "ClusterIP"
