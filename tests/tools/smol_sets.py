"""The modules of tools/smol_sets, imported as `python tools/smol_sets` does: from their own folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools" / "smol_sets"

sys.path.insert(0, str(FOLDER))
spec = importlib.util.spec_from_file_location("smol_sets_main", FOLDER / "__main__.py")
assert spec is not None
assert spec.loader is not None
main = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main)
answers, drawings, naming, packages, rendering, tables = (
    importlib.import_module(name)
    for name in ("answers", "drawings", "naming", "packages", "rendering", "tables")
)
sys.path.remove(str(FOLDER))
