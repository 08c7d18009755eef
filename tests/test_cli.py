"""minigpt4_jax.cli on the tiny model: what is printed, and that every mistake is one message with exit code 2."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from convert.projection import ProjectionInfo, read_projection, write_projection
from minigpt4_jax import Chat, GenerationConfig, MiniGPT4, api, cli
from minigpt4_jax.config import ModelConfig, TrainConfig
from minigpt4_jax.config_file import load
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all calls, as on a user's machine: the second one compiles nothing."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def tiny_weights(tiny_params: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands find random frozen parts that write printable text; process-wide settings are put back."""
    tokenizer = byte_tokenizer()
    embedding = np.array(tiny_params["llama"]["embed_tokens"]["embedding"])
    printable = tokenizer.encode("".join(map(chr, range(32, 127))))
    embedding[np.setdiff1d(np.arange(len(embedding)), printable)] = 0
    llama = {**tiny_params["llama"], "embed_tokens": {"embedding": embedding}}
    frozen = {"vit": tiny_params["vit"], "ln_vision": tiny_params["ln_vision"], "llama": llama}
    monkeypatch.setattr(api, "load_frozen", lambda name, progress=None: (dict(frozen), tokenizer))
    monkeypatch.setenv("MINIGPT4_CACHE", str(cache))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    cli._set_up_jax()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "a picture.png"
    pixels = np.random.default_rng(41).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def projection_file(tmp_path: Path, tiny_config: ModelConfig, tiny_params: Any) -> Path:
    path = tmp_path / "tiny.safetensors"
    projection = {name: np.asarray(leaf) for name, leaf in tiny_params["llama_proj"].items()}
    info = ProjectionInfo(config=tiny_config, licence="x", attribution="y", frozen_parts={})
    write_projection(path, projection, info=info)
    return path


@pytest.fixture
def options(projection_file: Path) -> list[str]:
    model = ["--preset", "tiny", "--projection", str(projection_file), "--context", "200"]
    return [*model, "--max-new-tokens", "12", "--repetition-penalty", "3"]


@pytest.fixture
def chat(picture: Path, projection_file: Path) -> Chat:
    """The same conversation through the Python interface."""
    model = MiniGPT4.load("tiny", projection=projection_file, context=200)
    chat = model.start_chat(GenerationConfig(max_new_tokens=12, repetition_penalty=3.0))
    chat.add_image(picture)
    return chat


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


# --- chat ---


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


@pytest.fixture
def second(tmp_path: Path) -> Path:
    file = tmp_path / "another picture.png"
    Image.fromarray(np.random.default_rng(42).integers(0, 256, (31, 22, 3), np.uint8)).save(file)
    return file


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


def test_a_missing_picture_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_message(["chat", "no such.png", "Hi"], "no picture at 'no such.png'", capsys)


def test_a_bad_picture_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **settings: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "_set_up_jax", load)
    monkeypatch.setattr(MiniGPT4, "load", load)
    (tmp_path / "p.png").touch()
    assert_one_message(["chat", str(tmp_path / "p.png"), "Hi"], "it is empty (0 bytes)", capsys)


def test_a_wrong_projection_is_said_before_the_frozen_parts_are_loaded(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **settings: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(api, "load_frozen", load)
    shipped = str(ROOT / "minigpt4_jax" / "assets" / "smol_projection.safetensors")
    wrong = ["--preset", "tiny", "--projection", shipped]
    assert_one_message(["chat", str(picture), "Hi", *wrong], "projects 6144 -> 576", capsys)


def test_a_full_disk_anywhere_is_one_message(
    train_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setattr(cli, "load", full)
    said = "'run/metrics.jsonl': No space left on device. The disk is full; expected room"
    assert_one_message(["train", "--config", str(train_config)], said, capsys)


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
        (["--preset", "huge"], "no preset 'huge'"),
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
        ["chat", str(picture), "Hi", "--preset", "tiny"], "ships no projection", capsys
    )


# --- train ---


@pytest.fixture
def train_config(tmp_path: Path) -> Path:
    """A YAML file and a set of four pictures."""
    folder = tmp_path / "set"
    (folder / "image").mkdir(parents=True)
    annotations = []
    for number, colour in enumerate(["red", "green", "blue", "black"]):
        Image.new("RGB", (28, 28), colour).save(folder / "image" / f"{number}.jpg")
        annotations.append({"image_id": number, "caption": colour})
    (folder / "filter_cap.json").write_text(json.dumps(annotations))
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"preset: tiny\nworkdir: {tmp_path / 'run'}\ndata:\n  folder: {folder}\n  batch_size: 2\n"
        "optimizer:\n  max_steps: 4\n  warmup_steps: 1\n"
    )
    return file


def test_train_makes_a_projection_that_chat_takes(
    train_config: Path, tmp_path: Path, picture: Path, tiny_config: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert cli.main(["train", "--config", str(train_config), "licence=mine", "log_every=1"]) == 0
    out = capsys.readouterr().out
    path = tmp_path / "run" / "projection.safetensors"
    assert out.splitlines()[-1] == f"Done: {path}"
    assert [row["step"] for row in read_metrics(path.parent)] == [1, 2, 3, 4]
    projection, info = read_projection(path, tiny_config)
    assert projection["kernel"].shape == (tiny_config.projection_in, tiny_config.llama.width)
    assert info is not None
    assert info.licence == "mine"

    arguments = ["--preset", "tiny", "--projection", str(path), "--context", "200"]
    assert cli.main(["chat", str(picture), "Hi", *arguments, "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    second = [f"init_projection={path}", f"workdir={tmp_path / 'second'}"]
    assert cli.main(["train", "--config", str(train_config), *second]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--config", str(train_config), "optimizer.init_lr=0.5"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("minigpt4: ")
    assert "other settings (licence" not in err[-1]
    assert "other settings (optimizer.init_lr)" in err[-1]


def test_print_config_prints_what_would_be_run(
    train_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", str(train_config), "--print-config", "data.batch_size=3"]
    assert cli.main(arguments) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load(TrainConfig, printed)
    assert config == load(TrainConfig, train_config, ["data.batch_size=3"])
    assert config.data.batch_size == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optimizer.init_rl=1",
            "unknown key 'optimizer.init_rl'. Did you mean 'optimizer.init_lr'?",
        ),
        ("data.batch_size=many", "expected a whole number"),
        ("data.batch_size", "expected key=value"),
        ("data.folder=''", "expected two folders"),
        ("data.folder=nowhere", "Cannot read nowhere"),
        ("data.max_text_len=2", "data.max_text_len"),
        ("init_projection=none.safetensors", "none.safetensors"),
        ("preset=huge", "no preset 'huge'"),
        ("data.template=other", "other"),
    ],
)
def test_a_mistake_in_the_settings_is_said_without_a_traceback(
    override: str, said: str, train_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--config", str(train_config), override]) == 2
    err = capsys.readouterr().err
    assert "minigpt4: " in err
    assert said in err
    assert "Traceback" not in err


def test_a_missing_configuration_file_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_message(["train", "--config", "no.yaml"], "no configuration file 'no.yaml'", capsys)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_shipped_configuration_loads(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(file), "--print-config"]) == 0
    assert "preset: " in capsys.readouterr().out


# --- the program as people start it ---


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_convert_shows_its_own_help() -> None:
    found, expected = run("minigpt4_jax.cli", "convert", "--help"), run("convert", "--help")
    assert found.returncode == expected.returncode == 0
    assert "usage: " in found.stdout
    assert found.stdout.splitlines()[1:] == expected.stdout.splitlines()[1:]


def test_a_mistake_in_the_shell_is_one_line_and_exit_code_2() -> None:
    done = run("minigpt4_jax.cli", "chat", "nowhere.png", "Hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minigpt4: There is no picture at 'nowhere.png'")
    assert len(done.stderr.splitlines()) == 1


def test_no_command_shows_what_there_is() -> None:
    done = run("minigpt4_jax.cli")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: minigpt4")


def test_train_py_is_the_train_command() -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--config", "no.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "minigpt4: There is no configuration file 'no.yaml'.\n"
