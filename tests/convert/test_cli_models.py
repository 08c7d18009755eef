"""`python -m convert PRESET` on a tiny model: what it writes, what it says, what it refuses, and how it goes on.

Faults that make one test fail each: a source given to the wrong table
`test_every_part_is_in_the_folder_in_the_dtype_of_its_file`; a folder that appears before it is whole
`test_an_interrupted_conversion_goes_on_where_it_stopped`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from convert import __main__ as cli
from convert import model as model_module
from convert.pth import write_pth
from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import UserError
from minigpt4_jax.data.tokenizer import load_tokenizer
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests import published_files as published

Files = dict[str, str]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return published.write_files(tmp_path / "downloads")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_out", Console(width=250))


def convert(files: Files, out: Path, *more: str, name: str = "vicuna-7b") -> int:
    return cli.main([name, *published.command(files, out=out), *more])


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = ModelFolder(one), ModelFolder(other)
    assert set(ours.names()) == set(theirs.names())
    for name in theirs.names():
        assert ours.dtype(name) == theirs.dtype(name), name
        np.testing.assert_array_equal(ours.get(name), theirs.get(name), err_msg=name)


def test_every_part_is_in_the_folder_in_the_dtype_of_its_file(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(files, out) == 0
    folder = ModelFolder(out)
    folder.require_whole()
    assert folder.preset == dataclasses.replace(PRESETS["vicuna-7b"], model=published.MODEL)
    wanted = leaf_names(abstract_params(published.MODEL))
    assert {name: folder.shape(name) for name in folder.names()} == {
        name: leaf.shape for name, leaf in wanted.items()
    }
    for name in folder.names():
        part = name.split("/")[0]
        assert folder.dtype(name) == published.DTYPES.get(part, np.float32), name
    vit, model = published.MODEL.vit, published.MODEL
    eva = published.eva_arrays(vit)["blocks.1.attn.qkv.weight"]
    found = folder.get("vit/blocks/1/attn/k_proj/kernel")
    np.testing.assert_array_equal(found, eva[vit.width : 2 * vit.width].T)
    assert model.qformer is not None
    blip2 = published.qformer_arrays(model.qformer, vit)
    for ours, theirs in (("ln_vision/scale", "ln_vision.weight"), ("query_tokens",) * 2):
        np.testing.assert_array_equal(folder.get(ours), blip2[theirs])
    name = "Qformer.bert.encoder.layer.2.crossattention.self.value.weight"
    found = folder.get("qformer/layer/2/cross_attention/v_proj/kernel")
    np.testing.assert_array_equal(found, blip2[name].T)
    projection = published.projection_arrays(model)
    np.testing.assert_array_equal(
        folder.get("llama_proj/kernel"), projection["llama_proj.weight"].T
    )
    tokenizer = load_tokenizer(out)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    said = capsys.readouterr().out
    assert f"{len(folder.names())} (" in said, "as inspect counts the tensors"
    assert "qformer from blip2.pth" in said
    assert "left out: t5_proj.weight, t5_proj.bias: leads to BLIP-2's language model" in said
    assert "tokenizer: The language model has one row more" in said
    assert f"Written to {out}. Talk to it: minigpt4 chat PICTURE --model {out}" in said


def test_the_manifest_says_which_files_the_model_is_made_of(files: Files, out: Path) -> None:
    assert convert(files, out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    held = {
        part: [file["name"] for file in source["files"]]
        for part, source in manifest["sources"].items()
    }
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert held == {
        "vit": ["eva.pth"], "qformer": ["blip2.pth"], "llama": shards, "llama_proj": ["proj.pth"]
    }  # fmt: skip
    assert manifest["settings"]["preset"] == "vicuna-7b"
    assert manifest["settings"]["vit"] == str(Path(files["vit"]).absolute())


def test_a_yaml_file_holds_what_the_options_say(
    files: Files, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*published.command(files, out=out), "--dtype", "float32", "--excuse", "a.{i}"]
    assert cli.main(["vicuna-7b", *options, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert not out.exists()
    config = tmp_path / "model.yaml"
    config.write_text(printed)
    assert cli.main(["vicuna-7b", "--config", str(config), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main(["vicuna-7b", "--config", str(config), "excuse=[]", "dtype=source"]) == 0
    assert convert(files, tmp_path / "typed") == 0
    assert_same_weights(out, tmp_path / "typed")


def test_what_is_typed_comes_before_the_yaml_file(
    files: Files, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "model.yaml"
    config.write_text(f"vit: other.pth\nqformer: {files['qformer']}\nexcuse: [one]\n")
    command = ["--config", str(config), "--vit", files["vit"], "--excuse", "two", "--print-config"]
    assert cli.main(["vicuna-7b", *command]) == 0
    printed = capsys.readouterr().out
    assert f"vit: {files['vit']}\n" in printed
    assert f"qformer: {files['qformer']}\n" in printed
    assert "excuse:\n- one\n- two\n" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_as_asked(files: Files, out: Path, dtype: str) -> None:
    assert convert(files, out, "--dtype", dtype) == 0
    folder = ModelFolder(out)
    assert {str(folder.dtype(name)) for name in folder.names() if "llama_proj" not in name} == {
        dtype
    }


def test_tensors_are_left_out_by_name_and_only_those(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = published.eva_arrays(published.MODEL.vit)
    write_pth(Path(files["vit"]), arrays | {"extra.3.gamma": np.ones(5, np.float16)})
    assert convert(files, out) == 2
    assert "extra.3.gamma [5]" in capsys.readouterr().err
    assert not out.exists()
    assert convert(files, out, "--excuse", "extra.{i}.gamma") == 0
    assert "left out: extra.3.gamma: left out as asked" in capsys.readouterr().out


def test_tensors_of_the_projection_are_left_out_by_name_too(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = published.projection_arrays(published.MODEL)
    more = {"ln_vision.weight": np.ones(3, np.float32)}
    write_pth(Path(files["projection"]), {"model": arrays | more})
    assert convert(files, out) == 2
    assert "ln_vision.weight [3]" in capsys.readouterr().err
    assert convert(files, out, "--excuse", "ln_vision.weight") == 2
    # The Q-Former's file has a tensor of that name, which the model needs.
    assert "excused, but a rule uses it" in capsys.readouterr().err
    write_pth(
        Path(files["projection"]), {"model": arrays | {"scaler.scale": np.ones(1, np.float32)}}
    )
    assert convert(files, out, "--excuse", "scaler.scale") == 0
    assert "scaler.scale: left out as asked" in capsys.readouterr().out


def test_an_excuse_that_fits_no_tensor_is_refused(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(files, out, "--excuse", "norm.*", "--excuse", "nrom.*") == 2
    err = capsys.readouterr().err
    assert "--excuse nrom.*: no source has a tensor of that name" in err


def test_a_delta_is_added_to_its_base(files: Files, out: Path, tmp_path: Path) -> None:
    """The base has one row less than the delta, as LLaMA and Vicuna v0."""
    merged = forms.draw(published.LLAMA, dtype=np.float32, seed=5)
    base = {
        name: np.round(x * 8) / 8 if "inv_freq" not in name else x for name, x in merged.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][:-1]
    smaller = forms.hf_json(published.LLAMA, vocab_size=published.LLAMA.vocab_size - 1)
    delta = forms.write_hugging_face(
        tmp_path / "delta", forms.as_delta(merged, base), config=forms.hf_json(published.LLAMA)
    )
    shutil.copy(Path(files["llm"]) / "tokenizer.model", delta)
    llm = forms.write_hugging_face(tmp_path / "base", base, config=smaller, kind="bin")
    assert convert(files | {"llm": str(llm), "delta": str(delta)}, out) == 0
    name = "model.layers.1.self_attn.k_proj.weight"
    found = ModelFolder(out).get("llama/layers/1/self_attn/k_proj/kernel")
    np.testing.assert_allclose(found, merged[name].T, rtol=1e-6, atol=1e-7)
    rows = ModelFolder(out).get("llama/embed_tokens/embedding")
    np.testing.assert_array_equal(rows[-1], merged["model.embed_tokens.weight"][-1])


def test_llama2_needs_no_qformer_and_takes_none(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = published.WITHOUT_QFORMER
    files = published.write_files(tmp_path / "downloads", model=model)
    command = published.command(files, out=out, model=model)
    assert cli.main(["llama2-7b", *command]) == 0
    folder = ModelFolder(out)
    assert folder.preset == dataclasses.replace(PRESETS["llama2-7b"], model=model)
    assert set(folder.names()) == set(leaf_names(abstract_params(model)))
    np.testing.assert_array_equal(folder.get("ln_vision/scale"), np.ones(model.vit.width))
    np.testing.assert_array_equal(folder.get("ln_vision/bias"), np.zeros(model.vit.width))
    capsys.readouterr()
    assert cli.main(["llama2-7b", *command, "qformer=blip2.pth", f"out={out}2"]) == 2


def test_missing_options_are_listed_together(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["vicuna-7b", "--vit", files["vit"], "--out", str(out)]) == 2
    assert "missing: --llm, --projection, --qformer." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("vit", "qformer", "was given as --vit, but it is BLIP-2's Q-Former file"),
        ("qformer", "vit", "was given as --qformer, but it is the EVA image tower"),
        ("projection", "vit", "it is the EVA image tower"),
        ("llm", "vit", "is one file; the sizes of a language model lie beside it"),
        ("vit", "llm", "was given as --vit, but it is a LLaMA-family language model"),
    ],
)
def test_a_file_under_the_wrong_option_is_told(
    option: str,
    given: str,
    said: str,
    files: Files,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(files | {option: files[given]}, out) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_problems_of_two_sources_are_listed_together_and_nothing_that_loads_is_left(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eva = published.eva_arrays(published.MODEL.vit)
    del eva["blocks.0.attn.proj.bias"]
    write_pth(Path(files["vit"]), eva)
    arrays = forms.draw(published.LLAMA, dtype=np.float16) | {"strange.weight": np.ones(3)}
    forms.write_hugging_face(Path(files["llm"]), arrays, config=forms.hf_json(published.LLAMA))
    assert convert(files, out) == 2
    err = capsys.readouterr().err
    assert "blocks.0.attn.proj.bias (for vit/blocks/0/attn/o_proj/bias)" in err
    assert "strange.weight [3]" in err
    assert "2 problem(s)" in err
    assert not out.exists()
    assert not list(out.parent.glob(".model*"))


def test_values_that_are_not_finite_in_two_sources_are_listed_together(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eva = published.eva_arrays(published.MODEL.vit)
    eva["blocks.0.norm1.weight"][3] = np.nan
    write_pth(Path(files["vit"]), eva)
    arrays = forms.draw(published.LLAMA, dtype=np.float16)
    arrays["model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
    forms.write_hugging_face(Path(files["llm"]), arrays, config=forms.hf_json(published.LLAMA))
    assert convert(files, out) == 2
    err = capsys.readouterr().err
    assert "vit/blocks/0/norm1/scale <- blocks.0.norm1.weight: 1 of 32 values" in err
    assert "llama/layers/1/mlp/up_proj/kernel" in err
    assert not out.exists()
    for left in (out, *out.parent.glob(".model*")):
        with pytest.raises(UserError, match="is no model folder"):
            ModelFolder(left)


def test_a_tokenizer_of_another_model_is_said_before_any_weight_is_written(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(published.LLAMA, vocab_size=published.LLAMA.vocab_size + 7)
    arrays = forms.draw(model, dtype=np.float16)
    forms.write_hugging_face(Path(files["llm"]), arrays, config=forms.hf_json(model))

    def written(*_: Any) -> None:
        raise AssertionError("weights were written")

    monkeypatch.setattr(model_module, "write_safetensors", written)
    assert convert(files, out, f"model.llama.vocab_size={model.vocab_size}") == 2
    assert "Take the tokenizer that came with the language model" in capsys.readouterr().err


def test_an_interrupted_conversion_goes_on_where_it_stopped(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = model_module.write_safetensors

    def interrupted(path: Path, entries: Any) -> Any:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, entries)

    monkeypatch.setattr(model_module, "write_safetensors", interrupted)
    assert convert(files, out) == 130
    err = capsys.readouterr().err
    assert "The same command goes on behind the last whole layer." in err
    assert not out.exists()
    with pytest.raises(UserError, match="is no model folder"):
        ModelFolder(out.with_name(".model.partial"))
    monkeypatch.setattr(model_module, "write_safetensors", write)
    assert convert(files, out) == 0
    assert "5 files of weights were whole from an earlier call" in capsys.readouterr().out
    assert convert(files, out.with_name("at once")) == 0
    assert_same_weights(out, out.with_name("at once"))
    assert not out.with_name(".model.partial").exists()


def test_a_killed_conversion_leaves_nothing_that_passes_for_whole(files: Files, out: Path) -> None:
    """Killed when all is written and only the name is missing."""
    command = ["vicuna-7b", *published.command(files, out=out)]
    script = f"""
        import os, signal
        from convert import __main__ as cli, model
        model.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        cli.main({command!r})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert out.with_name(".model.partial").exists()
    assert convert(files, out) == 0
    ModelFolder(out).require_whole()
    assert not out.with_name(".model.partial").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, "The disk is full; expected room"), (errno.EROFS, "Expected a place that you")],
)
def test_what_a_disk_does_while_weights_are_written_is_one_message(
    code: int,
    said: str,
    files: Files,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[Path] = []
    write = model_module.write_safetensors

    def full(path: Path, entries: Any) -> Any:
        if len(written) == 3:
            raise OSError(code, os.strerror(code), str(path))
        written.append(path)
        return write(path, entries)

    monkeypatch.setattr(model_module, "write_safetensors", full)
    assert convert(files, out) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error:") == 1
    assert not out.exists()
    monkeypatch.setattr(model_module, "write_safetensors", write)
    assert convert(files, out) == 0
    assert "3 files of weights were whole" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_one_message(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.touch()
    assert convert(files, out / "inside") == 2
    err = capsys.readouterr().err
    assert "Not a directory" in err
    assert "Traceback" not in err


def test_sizes_that_no_model_has_are_refused(
    files: Files, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(files, out, "model.vit.layers=3") == 2
    assert "unknown fields ['layers']" in capsys.readouterr().err
    assert convert(files, out, "model.vit.num_heads=5") == 2
    assert "VitConfig.width 32 is not a multiple of num_heads 5" in capsys.readouterr().err
