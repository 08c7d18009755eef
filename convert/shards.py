"""A model in one file or in several: which files a folder's index names, and whether they hold what it promises.

For: `SafetensorsSource` and `PthSource`, whose Hugging Face folders have an index of the same form.
Not for: what lies in the files.

Differs from the original, whose `transformers` takes the index's word and fails where a name is first missed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minigpt4_jax.config import UserError


def shard_files(path: Path, index: str) -> tuple[list[Path], set[str] | None]:
    """The files to read, and the tensor names that the index promises (None without an index).

    Args:
        path: a file, or a folder that holds `index`.

    Raises:
        UserError: an index that cannot be read, or that names files which are not there.
    """
    if not path.is_dir():
        return [path], None
    weight_map = _weight_map(path / index)
    shards = [path / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise UserError(
            f"{path / index} names {len(shards)} shards, these are not there: {', '.join(missing)}. Fetch them too."
        )
    return shards, set(weight_map)


def add_tensors(tensors: dict[str, Any], more: dict[str, Any], shard: Path) -> None:
    """Adds a shard's tensors to those of the earlier ones.

    Raises:
        UserError: a name that an earlier shard has too.
    """
    twice = sorted(set(tensors) & set(more))
    if twice:
        raise UserError(
            f"{shard} holds tensors that an earlier shard has too: {', '.join(twice)}. Fetch the folder again."
        )
    tensors |= more


def check_index(path: Path, indexed: set[str] | None, found: set[str]) -> None:
    """Compares what the index promises with what the shards hold.

    Raises:
        UserError: they differ; both differences are listed.
    """
    if indexed is None or indexed == found:
        return
    raise UserError(
        f"The shards in {path} and their index disagree. Only in the index: {sorted(indexed - found)}; only in the "
        f"shards: {sorted(found - indexed)}. The folder mixes files of two models; fetch it again."
    )


def _weight_map(index: Path) -> dict[str, str]:
    if not index.exists():
        raise UserError(
            f"There is no {index}; expected the index of a folder of shards. Give its folder, or one file."
        )
    try:
        content = json.loads(index.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or brackets without end
        raise UserError(f"{index} is no JSON ({error}). Fetch it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in weight_map.values()
    ):
        raise UserError(
            f"{index} holds no 'weight_map' from tensor names to files beside it. Fetch it again."
        )
    return weight_map
