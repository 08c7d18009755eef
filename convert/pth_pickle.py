"""The pickle inside a PyTorch file, read into inert records: nothing in it is ever imported or called.

For: dicts, lists, plain values and tensors as `torch.save` writes them (pickle protocol 2), by Python 3 or 2.
Not for: where a storage's bytes lie (`convert/pth_files.py`), and not for pickles in general: an opcode or a global
that is not listed here is an error.

A small interpreter of the opcodes that torch writes, and not a `pickle.Unpickler` with `find_class` overridden. The
latter, in C, recurses and hashes whatever the file asks for (a key that is a tuple nested a million times ends the
process), knows every opcode of six protocols and allocates before it asks. Here the stack is a list, keys are strings
and numbers, globals are names looked up in a table of our own records, and every step is paid from a budget, so the
memory is bounded by `MAX_STEPS` (some 100 MB, reached by no file of weights) and, below it, by the pickle's length.

Differs from the original, whose `torch.load` builds real objects, with code of the file's choice. torch's own
`weights_only` works as this file does. Opcodes: Python's `pickletools`. What they mean to torch:
https://github.com/pytorch/pytorch, torch/_weights_only_unpickler.py, torch/_utils.py, torch/serialization.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from minigpt4_jax.config import UserError

MAX_PICKLE = 64 << 20
"""Bytes of one pickle. That of the largest published model here is under 1 MB."""
MAX_STEPS = 1_000_000
"""Opcodes and copied entries of one pickle. A trainer's file with 3,000 weights and both Adam moments has 450,000."""
MAX_AXES = 64
"""What NumPy can hold."""
MAX_NAME = 512
"""Bytes in each line of a global's name."""

STORAGES: dict[str, np.dtype[Any]] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
"""The storage classes, by the name in the pickle."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something in Python that the pickle refers to; only ever a name."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements somewhere in the file."""

    dtype: np.dtype[Any]
    key: str
    numel: int
    """Elements of the whole storage `key`."""
    first: int
    """Where this one starts in it, in elements: not 0 in a view (legacy files)."""
    size: int
    """Elements from there on."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the pickle describes it; nothing says yet that the storage is as long."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Of each axis, in elements."""


class OrderedDict(dict[Any, Any]):
    """Stands for `collections.OrderedDict`; its attributes (`_metadata`) are read and dropped."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Pickled:
    """One pickle, read."""

    value: Any
    """Made of dict, list, tuple, str, int, float, bool, None, `Tensor`, `Storage` and `Global`."""
    stop: int
    """The position behind it."""
    storages: dict[str, Storage]
    """Every storage that it names, by key, as named first."""


def unpickle(data: Any, start: int, *, end: int, where: str) -> Pickled:
    """Reads one pickle.

    Args:
        data: bytes, or a memory map of the file.
        start: its first byte.
        end: where it must have ended; not necessarily its last byte.
        where: the file, for messages.

    Raises:
        UserError: a global or an opcode that is not listed here, a damaged pickle, or one beyond the limits above.
    """
    return _Machine(data, start, min(end, start + MAX_PICKLE), where).run()


def words(value: object) -> str:
    """Something from the file for a message: one line, printable, 100 characters."""
    text = value if isinstance(value, str) else f"a {type(value).__name__}"
    text = text if text.isprintable() else repr(text[:200])
    return text if len(text) <= 100 else f"{text[:97]}..."


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, data: Any, start: int, end: int, where: str) -> None:
        self._data, self._start, self._at, self._end = data, start, start, end
        self._where = where
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, Storage] = {}
        self._steps = 0

    def run(self) -> Pickled:
        while True:
            code = self.take(1)
            if code == b".":
                value = self.pop()
                if self._stack or self._below_marks:
                    self.fail("it stops with values left over")
                return Pickled(value, self._at, self._storages)
            self.pay(1)
            if code not in OPCODES:
                self.fail(
                    f"opcode {code!r} at byte {self._at - 1 - self._start} of the pickle, which torch.save does not "
                    "write in protocol 2"
                )
            OPCODES[code](self)

    # --- what the opcodes are made of ---

    def fail(self, reason: str) -> NoReturn:
        raise UserError(
            f"{self._where} is not a whole PyTorch file of tensors alone ({reason}). Nothing in it was executed. Fetch "
            "it again, or use a safetensors copy."
        )

    def pay(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            self.fail(f"the pickle takes more than {MAX_STEPS:,} steps")

    def take(self, count: int) -> bytes:
        if self._at + count > self._end:
            self.fail(f"the pickle is cut off, or longer than {MAX_PICKLE:,} bytes")
        taken: bytes = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, count: int) -> str:
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")

    def line(self) -> str:
        stop = self._data.find(b"\n", self._at, min(self._end, self._at + MAX_NAME))
        if stop < 0:
            self.fail("the name of a global has no end")
        return self.text(stop + 1 - self._at)[:-1]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            self.fail("an opcode finds no value")
        return self._stack.pop()

    def top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            self.fail(f"an opcode finds no {kind.__name__}")
        return self._stack[-1]

    def since_mark(self) -> list[Any]:
        if not self._below_marks:
            self.fail("an opcode finds no mark")
        items, self._stack = self._stack, self._below_marks.pop()
        return items

    # --- opcodes ---

    def mark(self) -> None:
        self._below_marks.append(self._stack)
        self._stack = []

    def put(self, key: int) -> None:
        self._memo[key] = self.top(object)

    def get(self, key: int) -> None:
        if key not in self._memo:
            self.fail(f"it refers to value {key}, which it never stored")
        self.push(self._memo[key])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            self.fail("a key has no value")
        self.fill(self.top(dict), items[::2], items[1::2])

    def fill(self, target: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            if type(key) not in (str, int, float, bool, type(None)):
                self.fail(f"a dict has {words(key)} for a key; expected a string")
            if key in target:
                self.fail(f"a dict has the key {words(str(key))!r} twice")
            target[key] = value

    def protocol(self) -> None:
        protocol = self.number("<B")
        if protocol != 2:
            self.fail(f"its pickle protocol is {protocol}; expected 2, which torch.save writes")

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def find(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in GLOBALS:
            raise UserError(
                f"{self._where} asks for the Python object {words(name)}, which tensors do not need. Expected dicts, "
                "plain values and tensors. Nothing in it was executed. Use a safetensors copy, or save the weights "
                "alone with torch."
            )
        self.push(GLOBALS[name])

    def persistent(self) -> None:
        """The only thing kept outside the pickle is a storage: ("storage", class, key, device, elements[, view])."""
        told = self.pop()
        if type(told) is not tuple or len(told) not in (5, 6) or told[0] != "storage":
            self.fail("it refers to something outside that is no storage")
        kind, key, numel = told[1], told[2], told[4]
        if type(kind) is not Global or kind.name not in STORAGES:
            self.fail("a storage has no type")
        if type(key) is not str or type(numel) is not int or numel < 0:
            self.fail("a storage has no name or no length")
        first, size = 0, numel
        if len(told) == 6 and told[5] is not None:
            first, size = self.view(told[5], numel)
        storage = Storage(STORAGES[kind.name], key, numel, first, size)
        self._storages.setdefault(key, storage)
        self.push(storage)

    def view(self, told: Any, numel: int) -> tuple[int, int]:
        if type(told) is not tuple or len(told) != 3 or not all(type(x) is int for x in told[1:]):
            self.fail("the view of a storage is no (name, offset, length)")
        first, size = told[1:]
        if first < 0 or size < 0 or first + size > numel:
            self.fail("the view of a storage reaches beyond it")
        return first, size

    def build(self) -> None:
        """Attributes of an OrderedDict (`_metadata`: the versions of the modules) are not weights."""
        self.pop()
        self.top(OrderedDict)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global or function.name not in CALLS:
            self.fail("it calls what is no function")
        if type(arguments) is not tuple:
            self.fail("it calls a function without arguments")
        self.push(CALLS[function.name](self, arguments))

    # --- stand-ins of the functions that may be called ---

    def ordered_dict(self, arguments: tuple[Any, ...]) -> OrderedDict:
        made = OrderedDict()
        if not arguments:
            return made
        pairs = arguments[0]  # how Python 2 writes it: [[key, value], ...]
        if len(arguments) != 1 or type(pairs) is not list:
            self.fail("an OrderedDict is made of something else than pairs")
        self.pay(len(pairs))  # one list can be named again and again
        if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            self.fail("an OrderedDict is made of something else than pairs")
        self.fill(made, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        return made

    def size(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(arguments) != 1 or type(arguments[0]) is not tuple:
            self.fail("a torch.Size is made of something else than a tuple")
        return arguments[0]

    def tensor(self, arguments: tuple[Any, ...]) -> Tensor:
        """`_rebuild_tensor(storage, offset, shape, strides)`."""
        if len(arguments) != 4:
            self.fail("a tensor is made of too many or too few parts")
        storage, offset, shape, strides = arguments
        if type(storage) is not Storage or type(offset) is not int or offset < 0:
            self.fail("a tensor has no storage")
        for axes in (shape, strides):
            if type(axes) is not tuple or len(axes) > MAX_AXES or len(axes) != len(shape):
                self.fail("a tensor has no shape")
            if not all(type(x) is int and x >= 0 for x in axes):
                self.fail("a tensor has a shape or strides that are no counts")
        return Tensor(storage, offset, shape, strides)

    def tensor_v2(self, arguments: tuple[Any, ...]) -> Tensor:
        """The same and `requires_grad, backward_hooks[, metadata]`, which say nothing about the values unless there
        is metadata: then they are negated or conjugated when used."""
        if len(arguments) not in (6, 7) or (len(arguments) == 7 and arguments[6]):
            self.fail("a tensor is made of too many or too few parts, or is a lazy negation")
        return self.tensor(arguments[:4])

    def parameter(self, arguments: tuple[Any, ...]) -> Tensor:
        """`_rebuild_parameter(tensor, requires_grad, backward_hooks)`."""
        if len(arguments) != 3 or type(arguments[0]) is not Tensor:
            self.fail("a parameter holds no tensor")
        return arguments[0]


CALLS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _Machine.ordered_dict,
    "torch.Size": _Machine.size,
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor_v2,
    "torch._utils._rebuild_parameter": _Machine.parameter,
}
"""The functions a file of weights calls, and what is done in their place."""

GLOBALS = {name: Global(name) for name in (*CALLS, *STORAGES)}
"""All that a pickle may name."""

OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"c": _Machine.find,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
    b"(": _Machine.mark,
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.since_mark()),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": _Machine.long,
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.text(m.number("<I"))),
    b"U": lambda m: m.push(m.text(m.number("<B"))),  # a string of Python 2
}
"""The opcodes that torch writes."""
