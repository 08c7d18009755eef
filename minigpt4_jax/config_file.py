"""A YAML file and `key=value` overrides to one of the dataclasses of `config.py`.

For: `load` and `to_yaml`; the only file that imports the YAML library, and only inside its functions. Not for: what
the settings are (`config.py`), how a message finds the key that was meant (`schema.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

from minigpt4_jax.config import UserError
from minigpt4_jax.schema import hint_of, leaves, nest, suggest, type_name

Schema = TypeVar("Schema")


def load(
    schema: type[Schema], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> Schema:
    """Builds `schema` from its defaults, then the YAML file, then `key=value` overrides, the last word winning.

    Args:
        schema: a frozen dataclass; its fields may be dataclasses, `dict[str, Dataclass]`, numbers, strings, `Literal`
            and tuples of plain values (`tuple[Dataclass, ...]` would go through unchecked, so it has no place here).
        path: YAML file, or None for the defaults alone.
        overrides: dotted keys with YAML values, such as `optimizer.max_steps=100` or `data.prompts=[a, b]`.

    Raises:
        UserError: every unknown key (with the closest known one), wrong type and missing value, in one message.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sources = [(str(path), _read_yaml(path))] if path is not None else []
    sources += [(f"override {text!r}", _read_override(text)) for text in overrides]
    merged = OmegaConf.structured(schema)
    problems = []
    for source, values in sources:
        for key, value in leaves(values, schema):
            hint = hint_of(schema, key)
            if hint is None:
                problems.append(f"{source}: unknown key {key!r}.{suggest(key, schema)}")
                continue
            try:
                if isinstance(value, bool) and hint in (str, str | None):
                    raise ValueError
                merged = OmegaConf.merge(merged, nest(key, value))
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                # Only OmegaConf sees an unknown key inside a `dict[str, Dataclass]`.
                detail = f" ({str(error).splitlines()[0]})" if get_origin(hint) is dict else ""
                problems.append(
                    f"{source}: {key} is {value!r}; expected {type_name(hint)}.{detail}"
                )
    if problems:
        raise UserError("\n".join(problems))
    where = path or "the command line"
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(
                "\n".join(
                    f"{where}: {key} is not set and has no default; expected "
                    f"{type_name(hint_of(schema, key))}. Add {key}=... to the command."
                    for key in missing
                )
            )
        return cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error


def to_yaml(config: object) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one (for `--print-config`)."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(Path(path)), resolve=False)
    except FileNotFoundError as error:
        raise UserError(
            f"There is no configuration file {str(path)!r}; expected a YAML file, such as those in configs. "
            "Check the path."
        ) from error
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as YAML: {error}. Expected a text file of `key: value` lines."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a list; expected lines of the form `key: value`.")
    return {str(key): value for key, value in values.items()}


def _read_override(text: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    key, equals, _ = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"{text!r} is not an override; expected key=value, without dashes.")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except YAMLError as error:
        raise UserError(f"The value in {text!r} is not YAML; quote it. ({error})") from error
    return cast(dict[str, Any], values)
