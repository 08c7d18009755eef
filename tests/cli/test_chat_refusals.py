"""minigpt4 chat with pictures, questions and options that cannot be used: one message, exit code 2, and soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax import MiniGPT4, cli, cli_options, loading
from tests.cli.messages import assert_one_message

LOAD = loading.load_decode_params
SHIPPED = Path(cli.__file__).parent / "assets" / "smol_projection.safetensors"


def test_a_missing_picture_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_message(["chat", "no such.png", "Hi"], "no picture at 'no such.png'", capsys)


def must_not_load(*args: Any, **settings: Any) -> None:
    """Takes the place of what may not be called."""
    raise AssertionError("loaded")


def test_a_bad_picture_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_options, "set_up_jax", must_not_load)
    monkeypatch.setattr(MiniGPT4, "load", must_not_load)
    (tmp_path / "p.png").touch()
    assert_one_message(["chat", str(tmp_path / "p.png"), "Hi"], "it is empty (0 bytes)", capsys)


def test_a_wrong_projection_is_said_before_the_frozen_parts_are_loaded(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "load_decode_params", LOAD)
    monkeypatch.setattr(loading, "_load", must_not_load)
    wrong = ["--model", "tiny", "--projection", str(SHIPPED)]
    assert_one_message(["chat", str(picture), "Hi", *wrong], "projects 6144 -> 576", capsys)


def test_a_folder_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_message(["chat", str(tmp_path), "Hi"], "it is a folder. Expected a file", capsys)


def test_a_file_that_is_no_picture_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.png"
    file.write_text("These are notes.")
    assert_one_message(
        ["chat", str(file), "Hi"], "notes.png': it is damaged or not a picture", capsys
    )


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_an_empty_question_is_one_message(
    question: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_message(["chat", str(picture), "Hi", question], "A question is empty", capsys)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--repetition-penalty", "-1"], "repetition_penalty is -1.0"),
        (["--context", "100000"], "context is 100000; expected at most 256"),
        (["--context", "10"], "The conversation is full"),
        (["--temperature", "-1"], "temperature is -1.0; expected 0"),
        (["--temperature", "1", "--top-k", "-1"], "top_k is -1; expected a whole number"),
        (["--temperature", "1", "--top-p", "1.5"], "top_p is 1.5; expected a number above 0"),
        (["--temperature", "1", "--seed", "-1"], "seed is -1; expected a whole number from 0"),
        (["--top-p", "0.9"], "--top-p would change nothing: the temperature is 0"),
        (["--top-k", "5", "--seed", "1", "--temperature", "0"], "--top-k and --seed would change"),
        (["--beams", "0"], "num_beams is 0; expected at least 1"),
        (["--beams", "2", "--temperature", "1"], "num_beams is 2 and temperature is 1.0; expected"),
        (["--length-penalty", "2"], "--length-penalty would change nothing: only beams"),
        (["--image", "no such.png"], "no picture at 'no such.png'"),
        (["--weights", "int4"], "weights is 'int4'; expected one of auto, float32, bfloat16, int8"),
        (["--cache", "int4"], "cache is 'int4'; expected one of auto, int8"),
        (["--model", "huge"], "no model 'huge'"),
        (["--projection", "none.safetensors"], "none.safetensors"),
    ],
)
def test_an_option_without_sense_is_one_message(
    changed: list[str],
    said: str,
    picture: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_one_message(["chat", str(picture), "Hi", *options, *changed], said, capsys)


def test_a_preset_without_a_shipped_projection_says_so(
    picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_message(
        ["chat", str(picture), "Hi", "--model", "tiny"], "ships no projection", capsys
    )
