"""The keys and types of a schema (a frozen dataclass), in the words of somebody who writes YAML.

For: finding a dotted key, its type and the closest known key, for the messages of `config_file.load`. Not for: the
schema itself (`config.py`) and reading files (`config_file.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Schema = TypeVar("Schema")


def leaves(values: dict[Any, Any], schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every entry, down to what is not a dataclass of the schema."""
    hints = get_type_hints(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        section = section_of(hints.get(str(name)))
        if isinstance(value, dict) and value and section is not None:
            yield from leaves(value, section, f"{key}.")
        else:
            yield key, value


def section_of(hint: Any) -> Any:
    """The dataclass of a section, also of one that may be null; None for a plain value."""
    candidates = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((each for each in candidates if dataclasses.is_dataclass(each)), None)


def hint_of(schema: Any, key: str) -> Any:
    """The type of a dotted key, or None where the schema has no such key."""
    hint = schema
    for name in key.split("."):
        section = section_of(hint)
        if section is None:
            return None
        hint = get_type_hints(section).get(name)
    return hint


def _known_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        section = section_of(hint)
        if section is not None:
            yield from _known_keys(section, f"{prefix}{name}.")


def suggest(key: str, schema: Any) -> str:
    """What to write instead of an unknown key: the closest known one, or all of them."""
    known = {full: full.rpartition(".")[2] for full in _known_keys(schema)}
    known = {full: name for full, name in known.items() if not key.startswith(f"{full}.")}
    last = key.rpartition(".")[2]
    close = [full for full, name in known.items() if name == last]  # right name, wrong section
    close += difflib.get_close_matches(key, known, n=1)
    names = difflib.get_close_matches(last, known.values(), n=1)
    close += [full for full, name in known.items() if name in names]
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" The keys here are {', '.join(get_type_hints(schema))}."


def nest(key: str, value: Any) -> Any:
    """`{"a": {"b": value}}` for the key `a.b`."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def type_name(hint: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in names:
        return names[hint]
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        items = [type_name(argument) for argument in arguments if argument is not ...]
        if ... in arguments:
            return f"a list such as [a, b] whose items are {items[0]}"
        return f"a list of {len(items)}: {', '.join(items)}"
    if origin is dict:
        return f"`name: value` lines whose values are {type_name(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "a section with the keys " + ", ".join(get_type_hints(hint))
    return str(hint)


def from_plain(schema: type[Schema], values: Any) -> Schema:
    """The frozen dataclass that `dataclasses.asdict` turned into plain values, also after a way through JSON.

    Raises:
        ValueError: keys that the schema lacks, or fields without a default that `values` lacks.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{schema.__name__} is {values!r}; expected its fields")
    hints = get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type] # a dataclass type
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        said = [f"has unknown fields {unknown}"] if unknown else []
        said += [f"lacks {missing}"] if missing else []
        raise ValueError(f"{schema.__name__} {' and '.join(said)}")
    return schema(**{name: _from_plain(hints[name], value) for name, value in values.items()})


def _from_plain(hint: Any, value: Any) -> Any:
    section = section_of(hint)
    if section is not None and value is not None:
        return from_plain(section, value)
    return tuple(value) if get_origin(hint) is tuple else value
