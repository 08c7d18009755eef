"""`python -m convert`: how commands explain themselves, what the small ones do, and how mistakes end.

Whole models are converted in `test_cli_models.py`, verified and exported in `test_cli_back.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from convert import __main__ as cli
from convert.arguments import PUBLISHED
from convert.projection import to_released
from minigpt4_jax import cli as minigpt4
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.model_folder import manifest_of
from minigpt4_jax.presets import PRESETS

Arrays = dict[str, np.ndarray]
COMMANDS = ("smol", *PUBLISHED, "inspect", "verify", "export", "projection")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_the_page_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for main, arguments in ((cli.main, ["--help"]), (minigpt4.main, ["convert", "--help"])):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        pages.append(capsys.readouterr().out)
    listed = pages[0].partition("commands:")[2].split()
    assert set(COMMANDS) <= set(listed)
    assert pages[0] == pages[1], "minigpt4 convert is the same command"
    assert {"vicuna-7b", "vicuna-13b", "llama2-7b"} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_takes_the_files_that_its_model_is_made_of(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    page = capsys.readouterr().out
    for option in ("--vit", "--llm", "--projection", "--tokenizer", "--excuse", "--dtype", "--out"):
        assert f"\n  {option} " in page
    assert ("--qformer" in page) == (PRESETS[name].model.qformer is not None)


def test_inspect_says_what_every_file_is(
    tmp_path: Path,
    gguf_arrays: Arrays,
    write_gguf: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_out", Console(width=200))
    source = write_gguf(tmp_path / "m.gguf", gguf_arrays)
    save_file({"llama_proj.weight": np.ones((4096, 768))}, tmp_path / "p.safetensors")
    assert cli.main(["inspect", str(source), str(tmp_path / "p.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "a LLaMA-family language model" in text
    assert "tiny" in text
    assert "it belongs to Vicuna-7B behind the Q-Former" in text
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2


def test_smol_says_what_it_is_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"project": "p", "version": "1", "member": "p/m.gguf", "licence": "MIT"}
    sources = {"llama": source | {"member_sha256": "ab" * 32}}
    manifest = manifest_of(PRESETS["smol"], sources, {})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    def prepared(progress: Callable[[str, int, int], None]) -> Path:
        progress("Converting", 1, 1)
        return tmp_path

    monkeypatch.setattr(cli, "prepare_smol", prepared)
    monkeypatch.setattr(cli, "_out", Console(width=200))
    assert cli.main(["smol"]) == 0
    out = capsys.readouterr().out
    assert "m.gguf" in out
    assert "MIT" in out
    assert str(tmp_path) in out


def test_projection_is_written_with_its_licence(tmp_path: Path, tiny_config: ModelConfig) -> None:
    tree = {
        "kernel": np.ones((tiny_config.projection_in, tiny_config.llama.width), np.float32),
        "bias": np.zeros(tiny_config.llama.width, np.float32),
    }
    save_file(to_released(tree), tmp_path / "released.safetensors")
    out = tmp_path / "ours.safetensors"
    command = ["projection", str(tmp_path / "released.safetensors"), "--out", str(out)]
    assert cli.main([*command, "--model", "tiny", "--licence", "MIT"]) == 0
    assert b'"licence":"MIT"' in out.read_bytes()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["projection", "nothing.pth", "--out", "x"], "There is no nothing.pth"),
        (["projection", "nothing.pth", "--out", "x", "--model", "huge"], "no model 'huge'"),
        (["verify", "."], "is no model folder"),
        (["verify", "nothing"], "is no model folder"),
        (["export", "."], "Nothing to export; expected --projection FILE, --llm DIR, or both"),
        (["export", ".", "--llm", "x"], "is no model folder"),
        (["vicuna-7b", "--config", "nothing.yaml"], "no configuration file 'nothing.yaml'"),
        (["vicuna-7b", "vti=x"], "unknown key 'vti'. Did you mean 'vit'?"),
        (["vicuna-7b", "dtype=int8"], "expected one of source, float32, bfloat16, float16"),
        (["llama2-7b", "--vit", "a"], "--out is not given"),
        (["llama2-7b", "--vit", "a", "--out", "."], "exists and is not an empty folder"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("error:") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["something"]


def test_ctrl_c_is_one_word_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(progress: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "prepare_smol", interrupted)
    assert cli.main(["smol"]) == 130
    assert "Stopped." in capsys.readouterr().err
