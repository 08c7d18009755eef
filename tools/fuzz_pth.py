"""Damages PyTorch files at random and looks what the reader makes of them.

    python -m tools.fuzz_pth [--inputs N] [--seed S]

Every input must end in tensors or in a `UserError`, within `LIMIT_S`, without an opened file besides it, an import or
a started program (an audit hook listens), and without more memory than the file could hold: the address space is
limited to `SPARE_BYTES` above what the process has, and every `TRACED`th input is traced and may take `PER_BYTE` bytes
for each of its own. Files of both formats are cut, flipped (anywhere, in the pickle, in the headers of the archive),
spliced with each other, and have opcodes dropped, doubled, swapped and put in, numbers made extreme, and calls of
`os.system` put in whose traces would be seen.

Not for: what a sound file means (`tests/convert/test_pth.py`, `tests/parity/test_torch_files.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from convert.pth import PthSource
from minigpt4_jax.config import UserError
from tools.pth_bytes import (
    PROTO,
    STOP,
    legacy_file,
    name,
    number,
    ordered,
    plain,
    state_dict,
    storage,
    tensor,
    text,
    zip_file,
)

CANARY = "canary"
LIMIT_S = 5.0
SPARE_BYTES = 256 << 20
TRACED = 8
PER_BYTE, FLOOR = 150, 200_000
"""Traced bytes allowed for each byte of an input, and for any. An opcode of one byte can make a dict of 64."""
WATCHED = (
    "import",
    "exec",
    "compile",
    "os.",
    "subprocess.",
    "shutil.",
    "socket.",
    "ctypes.",
    "pickle.find_class",
)


@dataclass
class Report:
    """What came of a run."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    """Number of the input, and what happened."""


# --- sound files ---


@dataclass(frozen=True)
class Seed:
    """A pickle and its storages, to be packed in one of the formats."""

    pickle: bytes
    storages: dict[str, tuple[int, bytes]]
    legacy: bool

    def packed(self, other: bytes | None = None) -> bytes:
        """The file, with another pickle if one is given."""
        content = self.pickle if other is None else other
        if self.legacy:
            return legacy_file(content, self.storages)
        return zip_file(content, {key: raw for key, (_, raw) in self.storages.items()})


def make_seeds() -> list[Seed]:
    """State dicts alone and in a trainer's file, with views and parameters, in both formats."""
    rng = np.random.default_rng(0)
    arrays = {
        "llama_proj.weight": rng.normal(size=(4, 6)).astype(np.float32),
        "llama_proj.bias": rng.normal(size=4).astype(np.float16),
        "position_ids": np.arange(8)[None],
        "flag": np.array([True]),
    }
    seeds = []
    for legacy in (False, True):
        view = b"N" if legacy else None
        shared = storage("Float", "0", 24, view=view)
        parameter = (
            name("torch._utils", "_rebuild_parameter") + b"(" + tensor(shared, (6, 4), (1, 6))
        )
        parameter += b"\x88" + name("collections", "OrderedDict") + b")RtR"
        model = state_dict(arrays, view=view)
        values = [
            model,
            plain(
                text("model") + model
                + text("optimizer") + plain(text("lr") + b"G" + struct.pack(">d", 1e-4) + text("params") + b"](K\0K\1e")
                + text("scaler") + b"N" + text("epoch") + b"K\3"
            ),
            ordered(text("a") + parameter + text("b") + tensor(shared, (2, 3), (12, 2), offset=1)),
        ]  # fmt: skip
        stored = {str(k): (x.size, x.tobytes()) for k, x in enumerate(arrays.values())}
        seeds += [Seed(PROTO + value + STOP, stored, legacy) for value in values]
    return seeds


# --- damage ---

NUMBERS = (
    0,
    -1,
    1,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    2**2000,
)
CALLS = (
    lambda shell: f"cos\nsystem\n(V{shell}\ntR".encode(),
    lambda shell: name("posix", "system") + b"(" + text(shell) + b"tR",
    lambda shell: name("builtins", "exec") + b"(" + text(f"import os; os.system({shell!r})") + b"tR",
    lambda shell: f"(S'{shell}'\nios\nsystem\n".encode(),
    lambda shell: b"(" + name("os", "system") + text(shell) + b"o",
    lambda shell: text("os") + text("system") + b"\x93(" + text(shell) + b"tR",
    lambda shell: name("subprocess", "Popen") + text(shell) + b"\x85\x81",
    lambda shell: name("torch._utils", "_rebuild_tensor_v2.__globals__") + b")R",
    lambda shell: name("collections", "OrderedDict") + b")R" + name("os", "system") + b"b",
    lambda shell: name("numpy.core.multiarray", "_reconstruct") + b")R",
    lambda shell: b"\x82\x01" + text(shell) + b"\x85R",
)  # fmt: skip


class Damage:
    """Draws damaged files from a seeded generator."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self._rng, self._seeds = rng, make_seeds()
        self._shell = f"touch {folder / CANARY}"
        self._kinds = (
            self.whole, self.cut, self.flipped, self.flipped_pickle, self.flipped_headers, self.opcodes,
            self.opcodes, self.opcodes, self.extremes, self.expanded, self.calls, self.spliced, self.header_fields,
            self.noise,
        )  # fmt: skip

    def draw(self) -> bytes:
        """One input."""
        return self._rng.choice(self._kinds)(self._rng.choice(self._seeds))

    def whole(self, seed: Seed) -> bytes:
        return seed.packed()

    def cut(self, seed: Seed) -> bytes:
        content = seed.packed()
        return content[: self._rng.randrange(len(content))]

    def flips(self, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
        out = bytearray(content)
        for _ in range(self._rng.choice((1, 1, 1, 2, 4, 16))):
            out[self._rng.randrange(start, stop or len(out))] = self._rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, self._rng.randrange(256))
            )
        return bytes(out)

    def flipped(self, seed: Seed) -> bytes:
        return self.flips(seed.packed())

    def flipped_pickle(self, seed: Seed) -> bytes:
        return seed.packed(PROTO + self.flips(seed.pickle, 2)[2:])

    def flipped_headers(self, seed: Seed) -> bytes:
        content = seed.packed()
        marks = (b"PK\3\4", b"PK\1\2", b"PK\5\6") if not seed.legacy else (b"\x80\x02", b"]q")
        found = [at for mark in marks for at in _all(content, mark)]
        start = self._rng.choice(found)
        return self.flips(content, start, min(start + 46, len(content)))

    def header_fields(self, seed: Seed) -> bytes:
        out = bytearray(seed.packed())
        marks = [at for mark in (b"PK\1\2", b"PK\5\6", b"PK\3\4") for at in _all(out, mark)] or [0]
        at, form = self._rng.choice(marks) + self._rng.randrange(4, 46), self._rng.choice("HI")
        value = self._rng.choice((0, 1, 2**16 - 1, 2**31, 2**32 - 1, len(out), len(out) - 1))
        if at + struct.calcsize(form) <= len(out):
            struct.pack_into(f"<{form}", out, at, value % 2 ** (8 * struct.calcsize(form)))
        return bytes(out)

    def opcodes(self, seed: Seed) -> bytes:
        parts = _opcodes(seed.pickle)
        everything = [code.code.encode("latin-1") for code in pickletools.opcodes]
        for _ in range(self._rng.choice((1, 1, 2, 3, 8))):
            at, other = self._rng.randrange(1, len(parts)), self._rng.randrange(1, len(parts))
            what = self._rng.randrange(6)
            if what == 0:
                del parts[at]
            elif what == 1:
                parts.insert(at, parts[other])
            elif what == 2:
                parts[at], parts[other] = parts[other], parts[at]
            elif what == 3:
                parts[at] = self._rng.choice(everything)
            elif what == 4:
                parts.insert(
                    at, self._rng.choice(everything) + self._rng.randbytes(self._rng.randrange(5))
                )
            else:  # a run, many times
                parts[at:at] = parts[at : at + self._rng.randrange(8)] * self._rng.choice(
                    (2, 30, 300)
                )
        return seed.packed(PROTO + b"".join(parts[1:]))

    def extremes(self, seed: Seed) -> bytes:
        parts = _opcodes(seed.pickle)
        places = [k for k, part in enumerate(parts) if part[:1] in (b"\x8a", b"K")]
        for at in self._rng.sample(places, min(len(places), self._rng.choice((1, 1, 2, 4)))):
            parts[at] = number(self._rng.choice(NUMBERS))
        return seed.packed(b"".join(parts))

    def expanded(self, seed: Seed) -> bytes:
        """A large number and zeros behind it: now and then these are the length of an axis and its strides."""
        parts = _opcodes(seed.pickle)
        places = [k for k, part in enumerate(parts) if part[:1] == b"\x8a"]
        first = self._rng.randrange(len(places))
        parts[places[first]] = number(self._rng.choice((1_000, 2**20, 2**40, 2**62)))
        for at in places[first + 1 :][: self._rng.randrange(4)]:
            parts[at] = number(0)
        return seed.packed(b"".join(parts))

    def calls(self, seed: Seed) -> bytes:
        parts, call = _opcodes(seed.pickle), self._rng.choice(CALLS)(self._shell)
        at = self._rng.randrange(1, len(parts))
        where = [k for k, part in enumerate(parts) if part.startswith(b"c")]
        if where and self._rng.random() < 0.5:
            module = self._rng.choice((b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n"))
            parts[self._rng.choice(where)] = module
        else:
            parts[at:at] = [call] if self._rng.random() < 0.5 else [call, b"0"]
        content = b"".join(parts)
        return content if self._rng.random() < 0.2 else seed.packed(content)

    def spliced(self, seed: Seed) -> bytes:
        one, two = seed.packed(), self._rng.choice(self._seeds).packed()
        return one[: self._rng.randrange(len(one))] + two[self._rng.randrange(len(two)) :]

    def noise(self, seed: Seed) -> bytes:
        start = self._rng.choice((b"", b"PK\3\4", PROTO, pickle.dumps(0x1950A86A20F9469CFC6C, 2)))
        return start + self._rng.randbytes(self._rng.randrange(200))


def _all(content: bytes | bytearray, mark: bytes) -> list[int]:
    found, at = [], content.find(mark)
    while at >= 0:
        found.append(at)
        at = content.find(mark, at + 1)
    return found


def _opcodes(content: bytes) -> list[bytes]:
    starts = [int(at or 0) for _, _, at in pickletools.genops(content)]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]


# --- the run ---


class Watch:
    """Hears what Python does while an input is read. A hook cannot be removed, so there is one, which sleeps."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.path is None:
            return
        if event == "open" and str(arguments[0]) == self.path and arguments[1] in ("r", "rb"):
            return
        if event == "open" or event.startswith(WATCHED):
            self.heard.append(f"{event} {str(arguments)[:80]}")


WATCH = Watch()


def read(path: Path) -> None:
    """Opens a file and reads all it holds."""
    source = PthSource(path)
    size = path.stat().st_size
    for label in source.names():
        array = source.get(label)
        if (array.shape, array.dtype) != (source.shape(label), source.dtype(label)):
            raise AssertionError(f"{label} is not what was said of it")
        if array.nbytes > size:
            raise AssertionError(f"{label} has {array.nbytes} bytes, the file {size}")
        array.tobytes()


def try_one(path: Path, *, traced: bool) -> str:
    """ "read", "refused", or what went wrong."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    if traced:
        tracemalloc.start()
    WATCH.heard, WATCH.path = [], str(path)
    try:
        read(path)
        outcome = "read"
    except UserError as error:
        outcome = "refused" if str(path) in str(error) else f"a message without the file: {error}"
    except BaseException as error:  # whatever the reader raises is what is looked for
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"{type(error).__name__}: {error}"
    finally:
        WATCH.path = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        tracemalloc.stop()
    if WATCH.heard or (path.parent / CANARY).exists():
        return f"executed {WATCH.heard}"
    if peak > PER_BYTE * path.stat().st_size + FLOOR:
        return f"took {peak} bytes for a file of {path.stat().st_size}"
    return outcome


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """An address space that ends `SPARE_BYTES` above what is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def fuzz(folder: Path, *, inputs: int, seed: int, progress: Progress | None = None) -> Report:
    """Tries `inputs` damaged files, one after the other, as `folder/input.pth`."""
    report, damage = Report(), Damage(random.Random(seed), folder)
    path = folder / "input.pth"
    task = progress.add_task("inputs", total=inputs) if progress else None
    path.write_bytes(make_seeds()[0].packed())
    try_one(path, traced=False)  # what the first reading imports is imported now
    with limited_memory():
        for count in range(inputs):
            path.write_bytes(damage.draw())
            outcome = try_one(path, traced=count % TRACED == 0)
            report.inputs += 1
            report.read += outcome == "read"
            report.refused += outcome == "refused"
            if outcome not in ("read", "refused"):
                report.crashes.append(f"input {count}: {outcome}")
                path.replace(folder / f"crash_{count}.pth")
                (folder / CANARY).unlink(missing_ok=True)
            if progress is not None and task is not None:
                progress.update(task, advance=1)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_pth_"))
    start = time.monotonic()
    with Progress() as progress:
        report = fuzz(folder, inputs=args.inputs, seed=args.seed, progress=progress)
    for crash in report.crashes:
        print(crash)
    print(
        f"seed {args.seed}: {report.inputs:,} inputs in {time.monotonic() - start:.0f} s, {report.read:,} read, "
        f"{report.refused:,} refused, {len(report.crashes)} crashes"
    )
    if report.crashes:
        print(f"The files are in {folder}.")
    return 1 if report.crashes else 0


if __name__ == "__main__":
    raise SystemExit(main())
