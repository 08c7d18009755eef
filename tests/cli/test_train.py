"""minigpt4 train on the tiny model: a run from settings to a projection that chat takes, and mistakes in settings."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert.projection import read_projection
from minigpt4_jax import cli
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.config_file import load
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.captions import read_captions
from minigpt4_jax.training.metrics import read_held_out, read_metrics
from tests.cli.messages import assert_one_message

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


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

    arguments = ["--model", "tiny", "--projection", str(path), "--context", "200"]
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


def test_a_run_shows_what_the_model_says_of_held_out_pictures(
    train_config: Path, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "held_out"
    (folder / "image").mkdir(parents=True)
    Image.open(picture).save(folder / "image" / "1.jpg")
    annotation = {"image_id": 1, "caption": "a <picture>"}
    (folder / "filter_cap.json").write_text(json.dumps([annotation]))
    settings = [f"held_out.folder={folder}", "held_out.every=2", "held_out.max_new_tokens=5"]
    assert cli.main(["train", "--config", str(train_config), *settings]) == 0
    out = capsys.readouterr().out
    workdir = tmp_path / "run"
    rows = read_captions(workdir)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert {row["truth"] for row in rows} == {"a <picture>"}
    for row in rows:
        assert f"annotation 0 (picture 1): {row['answer']!r} (truth: 'a <picture>')" in out
    assert out.count("held-out loss") == 3
    assert [row["step"] for row in read_held_out(workdir)] == [0, 2, 4]
    assert "a &lt;picture&gt;" in (workdir / "held_out.html").read_text()
    assert list((workdir / "tensorboard").iterdir())
    assert "Goodput" in out.splitlines()[-2]

    quiet = [*settings, "held_out.captions=0", f"workdir={tmp_path / 'quiet'}"]
    assert cli.main(["train", "--config", str(train_config), *quiet]) == 0
    assert read_captions(tmp_path / "quiet") == []
    assert len(read_held_out(tmp_path / "quiet")) == 3


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
        ("model=huge", "no model 'huge'"),
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


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(file), "--print-config"]) == 0
    assert "model: " in capsys.readouterr().out


def test_a_full_disk_anywhere_is_one_message(
    train_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setattr(cli, "load", full)
    said = "'run/metrics.jsonl': No space left on device. The disk is full; expected room"
    assert_one_message(["train", "--config", str(train_config)], said, capsys)
