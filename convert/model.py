"""Writes a whole model as a folder (`minigpt4_jax/model_folder.py`), two layers in memory at most.

For: `write_model`: checks every name before it writes, every value before it writes its layer; goes on behind the last
whole layer when it was interrupted; and what is not finished has another name, under which nothing loads it.
Not for: which sources and tables a model has (`parts.py`), nor for reading the folder.

Differs from the original's route (FastChat's `apply_delta`, `transformers`, `torch.load`), which holds the model two or
three times: 60 GB of memory for the 13B one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.problems import ConversionError, Problem
from convert.rules import Plan, Step
from convert.safetensors_writer import write_safetensors
from convert.source_hashes import SourceHashes
from minigpt4_jax.checksums import file_checksum, write_checksums
from minigpt4_jax.config import UserError
from minigpt4_jax.model_folder import MANIFEST, WEIGHTS, file_of, manifest_of
from minigpt4_jax.presets import Preset

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, parts done, parts in all)."""

JOURNAL = "journal.json"
_ROOM = 32 << 20  # bytes for the tokenizer, the headers and the journal


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_model` did."""

    excused: tuple[tuple[str, str], ...]
    """(source tensor, reason)."""
    kept: int
    """Files of weights that an interrupted call had left whole."""


def write_model(
    out: Path,
    plans: Mapping[str, Plan],
    *,
    preset: Preset,
    tokenizer: Callable[[Path], object],
    facts: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    progress: Progress,
) -> Written:
    """Converts everything in `plans` into the model folder `out`.

    Args:
        out: the folder to make; nothing may be there.
        plans: by the name of the part (`vit`, `llama`...). Together they fill the trees that the folder will have.
        preset: goes into the manifest: sizes and conventions.
        tokenizer: writes the tokenizer's files into the folder it is given.
        facts: by part, what the manifest says about its source beside its files.
        settings: what the conversion was told, for the manifest.
        progress: told how many tensors are done.

    Raises:
        ConversionError: every problem of all sources. What was whole before it was found stays for the next call.
        UserError: `out` exists, there is no room, or another process is converting into it.
    """
    require_new(out)
    problems = [problem for plan in plans.values() for problem in plan.problems]
    where = " and ".join(dict.fromkeys(plan.source.describe() for plan in plans.values()))
    if problems:
        raise ConversionError(where, problems)
    groups = _groups(plans)
    partial = out.with_name(f".{out.name}.partial")
    files = {part: plan.source.files() for part, plan in plans.items()}
    with _locked(partial), SourceHashes(files) as hashes:
        journal = _Journal(partial, _fingerprint(plans, preset))
        tokenizer(partial)  # before hours of weights: a tokenizer of another model is said at once
        kept = journal.whole()
        _require_room(
            partial, [step for name in groups if name not in kept for step in groups[name]]
        )

        def advance(done: int, total: int) -> None:
            hashes.allow(done / total)
            progress("Converting", done, total)

        problems = _write_groups(groups, kept, journal, advance)
        for plan in plans.values():
            problems += plan.copy_problems()
        if problems:
            raise ConversionError(where, problems)
        sources = {
            part: {**facts.get(part, {}), "files": found} for part, found in hashes.wait().items()
        }
        text = json.dumps(manifest_of(preset, sources, settings), indent=2, ensure_ascii=False)
        (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        known = journal.finish()
        write_checksums(partial, known=known)
        partial.rename(out)
    return Written(
        excused=tuple(pair for plan in plans.values() for pair in plan.excused),
        kept=len(kept),
    )


def require_new(out: Path) -> None:
    """Raises `UserError` where something is in the way of a folder that is to be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another --out.")


Group = list[tuple[Plan, Step]]


def _groups(plans: Mapping[str, Plan]) -> dict[str, Group]:
    """File of weights -> what goes into it, in the order of the sources."""
    groups: dict[str, Group] = {}
    for plan in plans.values():
        for step in plan.steps:
            groups.setdefault(file_of(step.path), []).append((plan, step))
    return groups


def _write_groups(
    groups: Mapping[str, Group],
    kept: Mapping[str, Any],
    journal: _Journal,
    advance: Callable[[int, int], None],
) -> list[Problem]:
    """Makes and writes every file that is not there yet: while one is written, the next one is made."""
    total = sum(map(len, groups.values()))
    done = sum(len(groups[name]) for name in kept)
    problems: list[Problem] = []
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for name, group in groups.items():
            if name in kept:
                continue
            values = {}
            for plan, step in group:
                value, found = plan.make(step)
                problems += found
                if value is not None:
                    values[step.path] = value
                done += 1
                advance(done, total)
            if writing is not None:
                writing.result()  # never more than two files in memory
            if (
                not problems
            ):  # after the first one the rest is only looked at, so that all are reported
                writing = writer.submit(journal.write, name, values)
        if writing is not None:
            writing.result()
    return problems


class _Journal:
    """The unfinished folder, and which of its files are whole.

    A journal of other sources, another table or another model is thrown away with its files, and that is said.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        self._entries: dict[str, Any] = {"fingerprint": fingerprint, "files": {}}
        with contextlib.suppress(FileNotFoundError, ValueError):
            stored = json.loads(self._path.read_text())
            if stored.get("fingerprint") == fingerprint:
                self._entries = stored
        for left in folder.iterdir():
            if left.name not in (WEIGHTS, JOURNAL):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        (folder / WEIGHTS).mkdir(exist_ok=True)
        for left in (folder / WEIGHTS).iterdir():
            if left.name not in self._entries["files"]:
                left.unlink()

    def whole(self) -> dict[str, Any]:
        """The files that an earlier call finished and that are still what it wrote, by the name of their group."""
        entries = self._entries["files"]
        for name in list(entries):
            path = self._folder / WEIGHTS / name
            if not path.exists() or file_checksum(path) != entries[name]:
                del entries[name]
                path.unlink(missing_ok=True)
        return {name.removesuffix(".safetensors"): entry for name, entry in entries.items()}

    def write(self, group: str, values: Mapping[str, Any]) -> None:
        """Writes one file of weights and notes it."""
        file = self._folder / WEIGHTS / f"{group}.safetensors"
        entries = [(name, value.shape, value.dtype, value) for name, value in values.items()]
        self._entries["files"][file.name] = write_safetensors(file, entries)
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps(self._entries))
        beside.replace(self._path)

    def finish(self) -> dict[str, Any]:
        """Removes the journal; checksums of all files of weights, by their path in the folder."""
        self._path.unlink()
        return {f"{WEIGHTS}/{name}": entry for name, entry in self._entries["files"].items()}


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keeps the unfinished folder for this process; the operating system lets go of the lock however it ends."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"Another process is converting into {partial}; wait for it, or choose another --out."
        ) from error
    finally:
        os.close(handle)


def _require_room(folder: Path, steps: Group) -> None:
    needed = sum(plan.size(step) for plan, step in steps) + _ROOM
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The disk of {folder.parent} has {free / 1e9:.2f} GB free; the model needs {needed / 1e9:.2f} GB. Free "
            "some space, or choose another --out, and run the command again: it goes on where it stopped."
        )


def _fingerprint(plans: Mapping[str, Plan], preset: Preset) -> str:
    """Changes with the sources' files, the tables, the storage dtype and the model."""
    facts: list[Any] = [asdict(preset)]
    for part, plan in plans.items():
        stats = [(str(file), file.stat()) for file in plan.source.files()]
        facts.append([part, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])
        facts += [(s.path, s.sources, s.rule.op.name, plan.size(s)) for s in plan.steps]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
