"""`python -m convert`: what it writes, what it prints, and exit code 2 with the whole list of problems."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from convert import __main__ as cli
from convert.projection import to_released
from minigpt4_jax.checkpoint import load_params
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import load_tokenizer
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms

Arrays = dict[str, np.ndarray]


def test_llama_writes_parameters_config_and_tokenizer(
    tmp_path: Path,
    tiny_config: ModelConfig,
    gguf_arrays: Arrays,
    write_gguf: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_out", Console(width=200))
    out = tmp_path / "out"
    source = write_gguf(tmp_path / "m.gguf", gguf_arrays)
    assert cli.main(["llama", str(source), "--out", str(out)]) == 0
    abstract = {"llama": abstract_params(tiny_config)["llama"]}
    params = load_params(out / "params", abstract)
    np.testing.assert_array_equal(
        params["llama"]["norm"]["scale"], gguf_arrays["output_norm.weight"]
    )
    assert load_tokenizer(out).eos_id == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["llama"]["num_kv_heads"] == tiny_config.llama.num_kv_heads
    assert "transpose to [in, out]" in capsys.readouterr().out


def test_delta_is_added_to_files_of_meta(tmp_path: Path) -> None:
    base = {n: x for n, x in forms.draw(dtype=np.float32).items() if not n.endswith("inv_freq")}
    theirs = forms.to_meta(base, heads=forms.LLAMA.num_heads, kv_heads=forms.LLAMA.num_kv_heads)
    source = forms.write_meta(tmp_path / "meta", theirs)
    delta = forms.write_hugging_face(tmp_path / "delta", {n: x / 64 for n, x in base.items()})
    out = tmp_path / "out"
    assert cli.main(["llama", str(source), "--out", str(out)]) == 2
    assert cli.main(["llama", str(source), "--delta", str(delta), "--out", str(out)]) == 0
    model = dataclasses.replace(PRESETS["tiny"].model, llama=forms.LLAMA)
    params = load_params(out / "params", {"llama": abstract_params(model)["llama"]})
    found = params["llama"]["layers"]["1"]["self_attn"]["k_proj"]["kernel"]
    np.testing.assert_array_equal(
        found, (base["model.layers.1.self_attn.k_proj.weight"] * (65 / 64)).T
    )


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


def test_all_problems_are_printed_and_nothing_is_written(
    tmp_path: Path,
    gguf_arrays: Arrays,
    write_gguf: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays = gguf_arrays | {"rope_freqs.weight": np.ones(4, np.float32)}
    del arrays["blk.1.attn_q.weight"]
    out = tmp_path / "out"
    source = write_gguf(tmp_path / "m.gguf", arrays)
    assert cli.main(["llama", str(source), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "blk.1.attn_q.weight (for layers/1/self_attn/q_proj/kernel)" in error
    assert "rope_freqs.weight [4]" in error
    assert "2 problem(s)" in error
    assert not out.exists()


def test_tensor_can_be_left_out_by_name(
    tmp_path: Path, gguf_arrays: Arrays, write_gguf: Callable[..., Path]
) -> None:
    arrays = gguf_arrays | {"extra.1.weight": np.ones(4, np.float32)}
    source = write_gguf(tmp_path / "m.gguf", arrays)
    command = ["llama", str(source), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert cli.main([*command, "--excuse", "extra.{i}.weight"]) == 0


def test_smol_says_what_it_is_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"project": "p", "version": "1", "member": "p/m.gguf", "licence": "MIT"}
    manifest = {"sources": {"llama": source | {"member_sha256": "ab" * 32}}}
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


def test_eva_vit_is_written_for_the_grid_asked_for(
    tmp_path: Path, tiny_config: ModelConfig
) -> None:
    rng = np.random.default_rng(0)
    d, f = tiny_config.vit.width, tiny_config.vit.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 10, d),
        "patch_embed.proj.weight": (d, 3, 7, 7),
        "patch_embed.proj.bias": (d,),
    }
    for name in (f"blocks.{i}." for i in range(2)):
        shapes |= {f"{name}{n}.{x}": (d,) for n in ("norm1", "norm2") for x in ("weight", "bias")}
        shapes |= {
            f"{name}attn.qkv.weight": (3 * d, d),
            f"{name}attn.q_bias": (d,),
            f"{name}attn.v_bias": (d,),
            f"{name}attn.proj.weight": (d, d),
            f"{name}attn.proj.bias": (d,),
            f"{name}mlp.fc1.weight": (f, d),
            f"{name}mlp.fc1.bias": (f,),
            f"{name}mlp.fc2.weight": (d, f),
            f"{name}mlp.fc2.bias": (d,),
        }
    source = tmp_path / "eva.safetensors"
    save_file({n: rng.normal(size=s).astype(np.float16) for n, s in shapes.items()}, source)
    out = tmp_path / "out"
    command = ["eva-vit", str(source), "--out", str(out), "--grid", "4", "--float32"]
    assert cli.main([*command, "--layers", "2", "--heads", "4"]) == 0
    params = load_params(out / "params", {"vit": abstract_params(tiny_config)["vit"]})
    assert params["vit"]["pos_embed"].shape == (1, 17, d)
    assert params["vit"]["cls_token"].dtype == np.float32


def test_projection_is_written_with_its_licence(tmp_path: Path, tiny_config: ModelConfig) -> None:
    tree = {
        "kernel": np.ones((tiny_config.projection_in, tiny_config.llama.width), np.float32),
        "bias": np.zeros(tiny_config.llama.width, np.float32),
    }
    save_file(to_released(tree), tmp_path / "released.safetensors")
    out = tmp_path / "ours.safetensors"
    command = ["projection", str(tmp_path / "released.safetensors"), "--out", str(out)]
    assert cli.main([*command, "--preset", "tiny", "--licence", "MIT"]) == 0
    assert b'"licence":"MIT"' in out.read_bytes()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["llama", "nothing.gguf", "--out", "x"], "There is no nothing.gguf"),
        (["llama", ".", "--out", "."], "exists and is not an empty folder"),
        (["projection", "nothing.pth", "--out", "x"], "There is no nothing.pth"),
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
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["smol", "llama", "inspect", "eva-vit", "projection"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_ctrl_c_is_one_word_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(progress: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "prepare_smol", interrupted)
    assert cli.main(["smol"]) == 130
    assert "Stopped." in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_message(
    tmp_path: Path,
    gguf_arrays: Arrays,
    write_gguf: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_gguf(tmp_path / "m.gguf", gguf_arrays)
    (tmp_path / "file").touch()
    assert cli.main(["llama", str(source), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in capsys.readouterr().err
