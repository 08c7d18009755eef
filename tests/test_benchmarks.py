"""The scripts of benchmarks/ start where they lie, beside one that has the name of the package `convert`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_script_of_the_folder_finds_the_package_and_not_its_neighbour() -> None:
    """As `python benchmarks/SCRIPT` does: the script's folder is first on the path."""
    folder = str(ROOT / "benchmarks")
    program = (
        f"import sys; sys.path.insert(0, {folder!r})\n"
        "from convert.projection import read_projection\n"
        "import convert; assert convert.__file__.endswith('__init__.py'), convert.__file__\n"
        f"assert sys.path[0] == {folder!r}, sys.path\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT)
