"""Importing the scripts of benchmarks/, whose neighbours go by bare names, as `python benchmarks/X.py` has them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load_script(name: str) -> ModuleType:
    """The module `benchmarks/NAME.py`. Its neighbours are found while it is imported, and not afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
