"""minigpt4 chat on the tiny model: what is printed, asked, shown and stopped in a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax import Chat, cli


def test_questions_are_answered_in_turn_with_memory(
    picture: Path, options: list[str], chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", str(picture), "What is this?", "Why?", *options]) == 0
    out, err = capsys.readouterr()
    first, second = chat.ask("What is this?"), chat.ask("Why?")
    assert out == f"> What is this?\n{first}\n\n> Why?\n{second}\n"
    # The random model never ends by itself.
    assert err.splitlines() == ["[cut off here: --max-new-tokens or --context is reached]"] * 2


def test_one_question_prints_the_answer_alone(
    picture: Path, options: list[str], chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", str(picture), "What is this?", *options]) == 0
    assert capsys.readouterr().out == chat.ask("What is this?") + "\n"


def test_without_a_question_a_conversation_opens(
    picture: Path,
    options: list[str],
    chat: Chat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = iter(["What is this?", "  Why? ", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert cli.main(["chat", str(picture), *options]) == 0
    out = capsys.readouterr().out
    expected = [chat.ask("What is this?"), chat.ask("Why?")]
    assert out.splitlines()[1:] == expected


def test_further_pictures_are_shown_with_the_first_question(
    picture: Path, second: Path, options: list[str], chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ["--image", str(second), "--image", str(picture)]
    assert cli.main(["chat", str(picture), "Compare.", *options, *shown]) == 0
    chat.add_image(second)
    chat.add_image(picture)
    assert capsys.readouterr().out == chat.ask("Compare.") + "\n"


def converse(lines: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert cli.main(["chat", *arguments]) == 0


def test_a_picture_can_be_shown_and_a_conversation_begun_again_from_the_terminal(
    picture: Path,
    second: Path,
    options: list[str],
    chat: Chat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = ["What is this?", f"/image {second}", "And this?", "/reset", "What is this?"]
    converse([*typed, f"/image  '{second}' ", "And this?"], [str(picture), *options], monkeypatch)
    out, err = capsys.readouterr()
    first = chat.ask("What is this?")
    chat.add_image(second)
    both = chat.ask("And this?")
    assert first != both
    seen = "Seen: the next question is about it."
    begun = "A new conversation, with the first pictures."
    assert out.splitlines()[1:] == [first, seen, both, begun, first, seen, both]
    assert "minigpt4:" not in err


def test_the_terminal_shows_its_commands(
    picture: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converse(["/help"], [str(picture), *options], monkeypatch)
    out, err = capsys.readouterr()
    assert err == ""
    for command in ("/image PATH", "/reset", "/help"):
        assert f"\n{command} " in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image", "no command '/image'; expected /image PATH, /reset or /help"),
        ("/image none.png", "no picture at 'none.png'"),
        ("/quit", "no command '/quit'"),
        ("/reset now", "no command '/reset now'"),
        ("/imagex a.png", "no command '/imagex a.png'"),
    ],
)
def test_a_mistyped_command_is_one_message_and_the_conversation_goes_on(
    line: str,
    said: str,
    picture: Path,
    options: list[str],
    chat: Chat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A space makes a question of what looks like a command.
    converse([line, " /image is what?"], [str(picture), *options], monkeypatch)
    out, err = capsys.readouterr()
    assert err.splitlines()[0].startswith("minigpt4: ")
    assert said in err.splitlines()[0]
    assert out.splitlines()[1:] == [chat.ask("/image is what?")]


def test_a_seed_draws_the_same_answer_again(
    picture: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*changed: str) -> str:
        assert cli.main(["chat", str(picture), "What is this?", *options, *changed]) == 0
        return capsys.readouterr().out

    hot = ["--temperature", "20", "--top-k", "20", "--top-p", "0.99"]
    assert answer(*hot, "--seed", "7") == answer(*hot, "--seed", "7")
    assert len({answer(*hot, "--seed", "7"), answer(*hot, "--seed", "8"), answer()}) == 3


def test_beams_search_for_the_answer(
    picture: Path, options: list[str], chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    beams = ["--beams", "3", "--length-penalty", "0.5"]
    assert cli.main(["chat", str(picture), "What is this?", *options, *beams]) == 0
    found = capsys.readouterr().out
    chat._generation = dataclasses.replace(chat._generation, num_beams=3, length_penalty=0.5)
    assert found == chat.ask("What is this?") + "\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(
    picture: Path,
    options: list[str],
    chat: Chat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed: Iterator[Any] = iter(["What is this?", "Go on.", EOFError])

    def answer(prompt: str) -> str:
        value = next(typed)
        if value is EOFError:
            raise EOFError
        return str(value)

    printed = 0

    def print_or_stop(*values: Any, **settings: Any) -> None:
        nonlocal printed
        printed += settings.get("end") == ""
        print(*values, **settings)
        if printed == 3 and settings.get("end") == "":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(cli, "print", print_or_stop, raising=False)
    assert cli.main(["chat", str(picture), *options]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    stream = chat.stream("What is this?")
    shown = "".join(next(stream) for _ in range(3))
    stream.close()
    # What was written before Ctrl-C is part of the conversation that goes on.
    assert lines == [f"{shown} [stopped]", chat.ask("Go on."), ""]


def test_ctrl_c_during_a_single_question_exits_as_shells_expect(
    picture: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(chat: Chat, question: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_print_answer", stop)
    assert cli.main(["chat", str(picture), "What is this?", *options]) == 130
    assert capsys.readouterr().err == "\nStopped.\n"
