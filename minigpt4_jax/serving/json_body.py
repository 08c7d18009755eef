"""From the bytes of a request to a checked model, or to a refusal that names the field.

For: JSON that nobody vouches for, and the words of every refusal about it. Not for: which fields there are
(`fields.py`).

The parser is pydantic's (jiter): it refuses invalid UTF-8, lone surrogates, NaN, numbers of thousands of digits and
nesting deeper than 200. Three things are added: bounds on the number of values, before anything is parsed, and of keys
(a body of 32 MiB that says `{},{},...` takes a gigabyte as Python objects); doubled keys, of which parsers silently
keep the last (RFC 8259 section 4 calls that unpredictable); and refusals in our own words: pydantic's repeat the input.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError

from minigpt4_jax.serving.errors import ApiError, invalid

ModelT = TypeVar("ModelT", bound=BaseModel)

MOST_SHOWN = 60
"""Characters of a value that a refusal repeats; a longer text is only counted."""
MISSING, WRONG_TYPE, WRONG_VALUE = "missing_required_parameter", "invalid_type", "invalid_value"
"""OpenAI's codes."""
OWN_KINDS = ("content", "stop")
"""Error types of the models' own making, whose message says what was expected."""
MOST_KEYS = 4096
"""Of one object: more than any has that is taken, and few enough that pydantic's list of complaints stays short."""
_WHERE = re.compile(r"line \d+ column \d+$")
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null: this is not supported",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} item(s)",
    "too_long": "at most {max_length} items",
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "string_pattern_mismatch": "a string of the form {pattern}",
}
"""By pydantic's error types: what was expected. Any other type is answered with a sentence without details."""


class _BadObject(Exception):
    """An object with a doubled key, or too many; the text says so in our words."""


def read_object(body: bytes, *, most_values: int) -> dict[str, Any]:
    """The JSON object that a body is.

    Args:
        most_values: more commas and brackets than this are refused unparsed.

    Raises:
        ApiError: 400: not JSON, a doubled key, no object, too many values.
    """
    count = sum(map(body.count, (b",", b"[", b"{")))
    if count > most_values:
        raise invalid(
            f"The body has {count} commas and brackets; expected at most {most_values}, which is more than a request "
            "within this server's limits has. Send fewer or shorter messages."
        )
    try:
        found = pydantic_core.from_json(body, allow_inf_nan=False)
        # Only for its hook: numbers are left as they are, since long ones take long.
        json.loads(body, object_pairs_hook=_check_keys, parse_int=str, parse_float=str)
    except _BadObject as error:
        raise invalid(str(error)) from None
    except (ValueError, RecursionError) as error:
        where = _WHERE.search(str(error))
        raise invalid(
            f"The body is not JSON{f' at {where[0]}' if where else ''}; expected one JSON object in UTF-8, nested at "
            "most 200 deep, without NaN, Infinity and half surrogate pairs."
        ) from None
    if not isinstance(found, dict):
        raise invalid(f"The body is {show(found)}; expected a JSON object.")
    return found


def _check_keys(pairs: Sequence[tuple[str, Any]]) -> None:
    if len(pairs) > MOST_KEYS:
        raise _BadObject(
            f"An object of the body has {len(pairs)} keys; expected at most {MOST_KEYS}."
        )
    if len(dict(pairs)) == len(pairs):
        return
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _BadObject(
                f"The key {show(key)} stands twice in one object of the body; expected it once."
            )
        seen.add(key)


def show(value: Any) -> str:
    """A value in a refusal: short ones as they are, the others by their kind. Never a data URL."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a whole number of more than 20 digits"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, str):
        if len(value) <= MOST_SHOWN and not value.lower().lstrip().startswith("data:"):
            return repr(value)
        return f"a string of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return _NAMES.get(type(value), "something else")


def check_off(plain: dict[str, Any], table: Mapping[str, Sequence[Any]], *, why: str) -> None:
    """Takes fields out of `plain` that are there but say nothing; `table` has the values that do so, beside null.

    Raises:
        ApiError: 400: one of them says something.
    """
    for name in [name for name in table if name in plain]:
        value = plain.pop(name)
        if value is None or any(_same(value, harmless) for harmless in table[name]):
            continue
        allowed = " or ".join(json.dumps(harmless) for harmless in table[name])
        hint = f" or with the value {allowed}" if allowed else ""
        raise invalid(
            f"{name} is {show(value)}; {why}: send the request without it{hint}.",
            param=name,
            code="unsupported_parameter",
        )


def _same(one: Any, other: Any) -> bool:
    """As `==`, but true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def check_model(model: type[ModelT], plain: dict[str, Any], *, known: Collection[str]) -> ModelT:
    """`plain` as a model. `known` are the names that an unknown one is compared with.

    Raises:
        ApiError: 400 with the path of the first field that is wrong.
    """
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        # Read here and not chained: the error holds the whole request.
        first = error.errors(include_url=False)[0]
    raise _refusal(first, plain, known)


def _refusal(error: Mapping[str, Any], plain: dict[str, Any], known: Collection[str]) -> ApiError:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    param = _path(error["loc"], plain)
    if kind == "extra_forbidden":
        name = str(error["loc"][-1])
        # A key may be megabytes long, and difflib looks at every letter.
        close = difflib.get_close_matches(name[:MOST_SHOWN], known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "/openapi.json lists what there is."
        return invalid(
            f"There is no field {show(name)} here. {hint}",
            param=param,
            code="unknown_parameter",
        )
    if kind.startswith("union_tag"):
        if not isinstance(value, dict):
            return invalid(
                f"{param} is {show(value)}; expected an object.", param=param, code=WRONG_TYPE
            )
        tag = context["discriminator"].strip("'")
        param, value = f"{param}.{tag}", value.get(tag)
    if kind in ("missing", "union_tag_not_found"):
        return invalid(f"{param} is missing; it is required.", param=param, code=MISSING)
    if kind == "value_error":
        expected = str(context["error"])
    elif kind in OWN_KINDS:
        expected = error["msg"]
    else:
        expected = _EXPECTED.get(kind, "another value").format_map(context)
    expected = "false" if expected == "False" else expected
    code = WRONG_TYPE if kind.endswith("_type") or kind in OWN_KINDS else WRONG_VALUE
    return invalid(f"{param} is {show(value)}; expected {expected}.", param=param, code=code)


def _path(loc: Sequence[str | int], plain: Any) -> str:
    """`messages[0].content`: pydantic's location without the tags of unions, which no client sent."""
    path = ""
    for place, step in enumerate(loc):
        last = place == len(loc) - 1
        if isinstance(step, int) and isinstance(plain, list):
            path += f"[{step}]"
            plain = plain[step] if step < len(plain) else None
        elif isinstance(plain, dict) and (step in plain or last):
            name = str(step) if len(str(step)) <= MOST_SHOWN else f"{str(step)[:MOST_SHOWN]}..."
            path += f".{name}" if path else name
            plain = plain.get(step)
    return path
