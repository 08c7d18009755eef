"""The hand-written tables of names and facts, from the YAML files beside this one.

For: `load_table`, and the words that several modules ask for. Not for: what is done with them. Their order counts where
the first of several entries that fit is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def load_table(name: str) -> dict[str, Any]:
    """The tables of `NAME.yaml`, by their names; in the order of the file."""
    text = Path(__file__).with_name(f"{name}.yaml").read_text("utf-8")
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables
