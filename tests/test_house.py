"""The house rules a machine can check: what imports without what, and what belongs in no file."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import convert
import minigpt4_jax

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "minigpt4_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])
MODULES = sorted(
    module.name
    for package in (minigpt4_jax, convert)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
)
ORACLES_AND_SERVERS = [
    "torch", "transformers", "onnxruntime", "fastapi", "starlette", "uvicorn", "sse_starlette", "prometheus_client",
    "httpx2", "tensorflow",
]  # fmt: skip
ENGINE_SIDE = ("errors", "jobs", "register", "rows", "scheduler", "slots", "watchdog")
"""Of `serving`: what a host without a web server, as machines with accelerators often are, imports all the same."""
WITHOUT_SERVER = [
    name
    for name in MODULES
    if not name.startswith("minigpt4_jax.serving.") or name.endswith(ENGINE_SIDE)
]
EXTRAS = [
    "gguf", "onnx", "grain", "array_record", "tensorflow_datasets", "tensorboardX", "pytest", "beartype"
]  # fmt: skip


def import_without(modules: list[str], blocked: list[str]) -> None:
    """Imports `modules` in a fresh interpreter in which `blocked` cannot be imported and is not installed."""
    script = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {blocked!r} if sys.modules.get(name) is not None])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_everything_imports_without_oracles_and_web_servers() -> None:
    import_without(WITHOUT_SERVER, ORACLES_AND_SERVERS)


def test_what_chat_needs_imports_without_any_extra() -> None:
    # The readers of foreign formats (`smol`) and Grain (`train`) are imported by the functions that use them.
    chat = [name for name in WITHOUT_SERVER if not name.startswith("minigpt4_jax.training")]
    import_without(chat, EXTRAS + ORACLES_AND_SERVERS)


def test_data_and_conversation_import_without_jax() -> None:
    quiet = [n for n in MODULES if n.startswith(("minigpt4_jax.data", "minigpt4_jax.conversation"))]
    assert quiet
    import_without(quiet, ["jax", "jaxlib", "flax"])


def test_every_room_has_a_contract_about_its_imports() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    covered = {name for c in settings["contracts"] for name in c.get("source_modules", [])}
    edges = {f"minigpt4_jax.cli{part}" for part in ("", "_caption", "_options", "_plan", "_serve")}
    rooms = {
        f"minigpt4_jax.{module.name}" for module in pkgutil.iter_modules(minigpt4_jax.__path__)
    }
    assert rooms - covered - edges == {"minigpt4_jax.presets"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_opens_with_its_purpose_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a file opens with what it is for"
    assert len(text.splitlines()) <= 400, "400 lines is the point to split a file"
    assert path.name != "utils.py"


@pytest.mark.parametrize("name", ["train.py", "serve.py"])
def test_entry_points_are_short(name: str) -> None:
    path = ROOT / name
    if path.exists():
        assert len(path.read_text().splitlines()) <= 60


def test_no_file_names_a_machine() -> None:
    # Home folders, scratch folders and addresses of package indexes belong to machines, not to the project.
    machine = re.compile(
        r"/home/\w|/root/|/tmp/w|/work/|file:///|\.whl\b.*https?://|find-links|index-url"
    )
    kinds = {".py", ".toml", ".md", ".yaml", ".yml", ".json", ".cfg", ".sh", ""}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / line for line in listed.stdout.splitlines()] or SOURCES
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in files
        if path.suffix in kinds and path != Path(__file__) and path.is_file()
        if "golden" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if machine.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_shipped_assets_stay_small() -> None:
    assets = ROOT / "minigpt4_jax" / "assets"
    total = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    assert total <= 8 * 1024 * 1024
