"""The API keys of a server: from a file, from the environment, never from the configuration or the command line.

For: `load_keys`, `check_exposure`. Not for: comparing them with a request's (`guards.KeyGuard`).

Differs from the original, whose demos call `launch(share=True)`: a public tunnel without a key. Here a server that
others can reach has one, unless the configuration says otherwise in so many words.
"""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from minigpt4_jax.config import UserError
from minigpt4_jax.serve_config import KEYS_VARIABLE, AccessConfig, ServeConfig

log = logging.getLogger(__name__)

KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{16,256}")
"""Visible ASCII without a comma: what a header can carry. Sixteen characters drawn at random cannot be guessed."""


def load_keys(access: AccessConfig, environ: Mapping[str, str]) -> tuple[str, ...]:
    """All keys, each once. A key's own text is in no message.

    Raises:
        UserError: a file that cannot be read or has no key, or a key that is no sequence of 16 to 256 visible ASCII
            characters.
    """
    found = [
        (f"number {number} of the environment variable {KEYS_VARIABLE}", key.strip())
        for number, key in enumerate(environ.get(KEYS_VARIABLE, "").split(","), 1)
        if key.strip()
    ]
    if access.api_keys_file:
        found += _of_file(Path(access.api_keys_file).expanduser())
    for where, key in found:
        if not KEY.fullmatch(key):
            raise UserError(
                f"The API key {where} has {len(key)} characters or some that no header can carry; expected 16 to 256 "
                "visible ASCII characters without commas. Make one with: openssl rand -hex 24"
            )
    return tuple(dict.fromkeys(key for _, key in found))


def _of_file(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="ascii")
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(
            f"access.api_keys_file is {str(path)!r}, which does not exist; expected a file with a key a line. Make one "
            f"with: (umask 077; openssl rand -hex 24 > {path})"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"access.api_keys_file {str(path)!r} holds bytes that are not ASCII; expected a key a line."
        ) from error
    # Reading by the group is how Kubernetes hands a secret to a process that is not root (`fsGroup`, mode 440).
    if mode & (stat.S_IWGRP | stat.S_IRWXO):
        log.warning(
            "%s can be read by everybody or changed by its group (mode %o); expected 600, or 640. Mend it with: "
            "chmod 600 %s",
            path, stat.S_IMODE(mode), path,
        )  # fmt: skip
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    found = [
        (f"in line {number} of {path}", line)
        for number, line in lines
        if line and not line.startswith("#")
    ]
    if not found:
        raise UserError(f"access.api_keys_file {str(path)!r} holds no key; expected one a line.")
    return found


def check_exposure(config: ServeConfig, keys: tuple[str, ...]) -> None:
    """Raises `UserError` where others could reach the server and nothing would be asked of them."""
    if not (config.loopback or keys or config.access.open_without_key):
        raise UserError(
            f"host is {config.host!r}, which others can reach, and there is no API key; expected a key. Name a file "
            f"with access.api_keys_file=PATH or set {KEYS_VARIABLE}. To serve everybody who reaches the port all the "
            "same: access.open_without_key=true"
        )
