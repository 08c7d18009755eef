"""Damaged steps of a training run: found before anything reads them, and set aside, never deleted.

For: `newest_whole_step`, `set_aside`. Not for: reading a step (`checkpoints.py`), checksums (`checksums.py`).

What counts as damage is any difference from the step's `checksums.json`: Orbax itself takes a step for whole whose
metadata, items or chunks are missing, cut or changed, and never looks for an older one.
"""

from __future__ import annotations

import logging
from pathlib import Path

from minigpt4_jax.checkpoint import CheckpointError, find_damage, listed
from minigpt4_jax.checksums import FILE as CHECKSUMS

Damage = dict[int, list[str]]
"""What is wrong with each step that was looked at; an empty list for a whole one."""
_log = logging.getLogger(__name__)


def newest_whole_step(folder: Path, damage: Damage) -> int | None:
    """The newest step of `folder` with nothing against it, or None where there is no step at all.

    Args:
        damage: what is known already; what is found is added.

    Raises:
        CheckpointError: all steps are damaged; the message has every one.
        NewerFormat: a later version of this project wrote the newest.
    """
    steps = _steps(folder)
    for step in steps:
        if step not in damage:
            damage[step] = _find_damage(folder, step, older=[s for s in steps if s < step])
        if not damage[step]:
            return step
    if not steps:
        return None
    each = "\n".join(f"  {folder / str(step)}: {listed(damage[step])}" for step in steps)
    raise CheckpointError(
        f"Every training checkpoint in {folder} is damaged:\n{each}\nBring the folder back from a copy, or start in a "
        "new workdir."
    )


def _steps(folder: Path) -> list[int]:
    """Newest first; what a killed save left has another name."""
    return sorted((int(f.name) for f in folder.iterdir() if f.name.isdecimal()), reverse=True)


def _find_damage(folder: Path, step: int, *, older: list[int]) -> list[str]:
    """A step without checksums is an earlier version's, unless there is an older step that has them."""
    listed_before = any((folder / str(s) / CHECKSUMS).exists() for s in older)
    if listed_before and not (folder / str(step) / CHECKSUMS).exists():
        return [f"{CHECKSUMS} is missing"]
    return find_damage(folder / str(step))


def set_aside(folder: Path, damage: Damage, *, good: int) -> None:
    """Renames the damaged steps newer than `good` to `<step>.corrupt`, and says so: the run does them again."""
    for step in sorted(step for step, problems in damage.items() if problems and step > good):
        aside = _free_name(folder, step)
        (folder / str(step)).rename(aside)
        told = (
            f"The training checkpoint {folder / str(step)} is damaged: {listed(damage[step])}. It is kept as {aside}; "
            f"the run goes on from step {good}."
        )
        _log.warning("%s", told)
        print(told, flush=True)


def _free_name(folder: Path, step: int) -> Path:
    """`<step>.corrupt`, or with a number where the same step was set aside before."""
    name, count = folder / f"{step}.corrupt", 1
    while name.exists():
        count += 1
        name = folder / f"{step}.corrupt{count}"
    return name
