"""What a command may say when something is wrong."""

from __future__ import annotations

import pytest

from minigpt4_jax import cli


def assert_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], *, lines: int = 1
) -> None:
    """Exit code 2 and `lines` lines on stderr, the first opening with the program's name."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minigpt4: ")
    assert said in err
    assert len(err.splitlines()) == lines, err
