"""keys.py: where keys come from, and that a server which others can reach has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.serve_config import KEYS_VARIABLE, AccessConfig, ServeConfig
from minigpt4_jax.serving.keys import check_exposure, load_keys

ONE, OTHER = "k" * 16, "another-key-0123456789"


def write(path: Path, text: str) -> AccessConfig:
    path.write_text(text)
    path.chmod(0o600)
    return AccessConfig(api_keys_file=str(path))


def test_keys_of_file_and_environment_are_taken_together_each_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    access = write(tmp_path / "keys", f"# for people\n{ONE}\n\n  {OTHER}  \n")
    environ = {KEYS_VARIABLE: f"{ONE}, {'e' * 20},"}
    assert set(load_keys(access, environ)) == {ONE, OTHER, "e" * 20}
    assert load_keys(AccessConfig(), {}) == ()
    assert caplog.text == ""


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602])
def test_a_file_that_everybody_reads_or_that_others_can_change_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    access = write(tmp_path / "keys", ONE)
    (tmp_path / "keys").chmod(mode)
    assert load_keys(access, {}) == (ONE,)
    assert f"mode {mode:o}" in caplog.text
    assert "chmod 600" in caplog.text
    assert ONE not in caplog.text


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o440])
def test_a_file_that_at_most_the_group_reads_is_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    access = write(tmp_path / "keys", ONE)
    (tmp_path / "keys").chmod(mode)
    assert load_keys(access, {}) == (ONE,)
    assert caplog.text == ""


@pytest.mark.parametrize("key", ["short", "with a space in it", "kéy-kéy-kéy-kéy-kéy", "k" * 257])
def test_a_key_that_is_weak_or_fits_no_header_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(UserError, match="expected 16 to 256 visible ASCII") as refused:
        load_keys(AccessConfig(), {KEYS_VARIABLE: f"{ONE},{key}"})
    assert "number 2" in str(refused.value)
    assert key not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"), [("", "holds no key"), ("# none\n", "holds no key"), ("ä" * 20, "not ASCII")]
)
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_keys(write(tmp_path / "keys", text), {})


@pytest.mark.parametrize(
    ("fields", "keys", "refused"),
    [
        ({}, (), False), ({"host": "localhost"}, (), False), ({"host": "127.8.8.8"}, (), False),
        ({"host": "::1"}, (), False), ({"host": "0.0.0.0"}, (), True), ({"host": "::"}, (), True),
        ({"host": "192.168.1.5"}, (), True), ({"host": "my-machine"}, (), True), ({"host": "0.0.0.0"}, (ONE,), False),
        ({"host": "0.0.0.0", "access": AccessConfig(open_without_key=True)}, (), False),
    ],
)  # fmt: skip
def test_an_address_that_others_reach_wants_a_key_or_the_word(
    fields: dict[str, Any], keys: tuple[str, ...], refused: bool
) -> None:
    config = ServeConfig(**fields)
    if not refused:
        check_exposure(config, keys)
        return
    with pytest.raises(UserError, match=r"there is no API key.*access\.open_without_key=true"):
        check_exposure(config, keys)
