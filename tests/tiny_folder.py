"""A model folder with any parameters, as `python -m convert` would have written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.model_folder import MANIFEST, WEIGHTS, file_of, manifest_of
from minigpt4_jax.presets import Preset


def write_folder(folder: Path, params: Any, *, preset: Preset) -> Path:
    """Without a tokenizer; `params` in the layout `DISK`."""
    (folder / WEIGHTS).mkdir(parents=True)
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, leaf in leaf_names(params).items():
        files.setdefault(file_of(name), {})[name] = np.asarray(leaf)
    for name, arrays in files.items():
        save_file(arrays, folder / WEIGHTS / f"{name}.safetensors")
    (folder / MANIFEST).write_text(json.dumps(manifest_of(preset, {"vit": {"files": []}}, {})))
    write_checksums(folder)
    return folder
