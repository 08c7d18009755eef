"""`verify --against-torch` agrees on what the converter wrote, and names the stage of every planted mistake.

Tiny random files, written from the formats' side (`tests/published_files.py`). Needs the `parity` extra.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from convert import __main__ as cli
from convert import against_torch, eva_vit, torch_side
from convert.against_torch import BAR, NEW_TOKENS, Comparison, compare_with_torch, difference
from convert.pth import write_pth
from convert.rules import Rule
from convert.settings import ConvertConfig
from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import to_yaml
from minigpt4_jax.model_folder import ModelFolder
from tests import llama_forms as forms
from tests.parity.test_blip2 import blip2
from tests.published_files import (
    LLAMA,
    MODEL,
    WITHOUT_QFORMER,
    eva_arrays,
    llama_arrays,
    projection_arrays,
    qformer_arrays,
    with_tokenizer,
)

Arrays = dict[str, np.ndarray]
MODELS = {"vicuna-7b": MODEL, "llama2-7b": WITHOUT_QFORMER}


def hugging_face(folder: Path) -> dict[str, Path]:
    return {
        "llm": with_tokenizer(
            forms.write_hugging_face(folder / "llm", llama_arrays(), config=forms.hf_json(LLAMA))
        )
    }


def bin_files(folder: Path) -> dict[str, Path]:
    config = forms.hf_json(LLAMA)
    return {
        "llm": with_tokenizer(
            forms.write_hugging_face(folder / "llm", llama_arrays(), config=config, kind="bin")
        )
    }


def gguf(folder: Path) -> dict[str, Path]:
    theirs = forms.to_meta(llama_arrays(), heads=LLAMA.num_heads, kv_heads=LLAMA.num_kv_heads)
    (folder / "words").mkdir()
    return {
        "llm": forms.write_gguf(
            folder / "llm.gguf",
            theirs,
            config=LLAMA,
            rope_freq_base=LLAMA.rope_base,
            vocab_size=LLAMA.vocab_size,
        ),
        "tokenizer": with_tokenizer(folder / "words"),
    }


def meta(folder: Path) -> dict[str, Path]:
    theirs = forms.to_meta(llama_arrays(), heads=LLAMA.num_heads, kv_heads=LLAMA.num_kv_heads)
    params = forms.params_json(LLAMA, max_seq_len=LLAMA.max_positions)
    return {
        "llm": with_tokenizer(forms.write_meta(folder / "llm", theirs, params=params, shards=1))
    }


def delta_v0(folder: Path) -> dict[str, Path]:
    """float16, with one row more than the base."""
    merged = {n: x for n, x in llama_arrays().items() if not n.endswith("inv_freq")}
    rng = np.random.default_rng(1)
    base = {n: (x + 0.01 * rng.normal(size=x.shape)).astype(np.float16) for n, x in merged.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][:-1]
    delta = forms.as_delta({n: x.astype(np.float16) for n, x in merged.items()}, base)
    fewer = forms.hf_json(dataclasses.replace(LLAMA, vocab_size=LLAMA.vocab_size - 1))
    return {
        "llm": forms.write_hugging_face(folder / "base", base, config=fewer),
        "delta": with_tokenizer(
            forms.write_hugging_face(folder / "delta", delta, config=forms.hf_json(LLAMA))
        ),
    }


@pytest.fixture
def convert_tiny(tmp_path: Path) -> Callable[..., ModelFolder]:
    """Writes the files of a tiny model and converts them with the command a person types."""

    def convert(
        name: str = "vicuna-7b",
        language: Callable[[Path], dict[str, Path]] = hugging_face,
        *,
        grid: int | None = None,
        sources: dict[str, Path] | None = None,
    ) -> ModelFolder:
        model = MODELS[name]
        vit = dataclasses.replace(
            model.vit, image_size=(grid or model.vit.grid) * model.vit.patch_size
        )
        write_pth(tmp_path / "eva.pth", eva_arrays(vit))
        write_pth(tmp_path / "projection.pth", {"model": projection_arrays(model)})
        files = {
            "vit": tmp_path / "eva.pth",
            "projection": tmp_path / "projection.pth",
            **language(tmp_path),
        }
        if model.qformer:
            write_pth(tmp_path / "blip2.pth", {"model": qformer_arrays(model.qformer, model.vit)})
            files["qformer"] = tmp_path / "blip2.pth"
        files |= sources or {}
        settings = ConvertConfig(
            model=dataclasses.asdict(model), **{part: str(path) for part, path in files.items()}
        )
        (tmp_path / "settings.yaml").write_text(to_yaml(settings))
        out = tmp_path / "out"
        assert cli.main([name, "--config", str(tmp_path / "settings.yaml"), "--out", str(out)]) == 0
        return ModelFolder(out)

    return convert


def compare(folder: ModelFolder) -> Comparison:
    return compare_with_torch(folder, *ConvertConfig.of_folder(folder))


@pytest.mark.parametrize("language", [hugging_face, bin_files, gguf, delta_v0])
def test_every_form_that_transformers_reads_agrees(
    convert_tiny: Any, language: Callable[[Path], dict[str, Path]]
) -> None:
    found = compare(convert_tiny(language=language))
    print({name: f"{value:.1e}" for name, value in found.stages.items()})
    assert list(found.stages) == [
        *("pixels", "image tower", "ln_vision", "Q-Former", "projection", "prompt embedding"),
        *("language model, layer 1", "language model, layer 2", "logits"),
    ]
    assert found.broken == []
    assert found.agreeing == NEW_TOKENS


def test_a_model_without_a_qformer_and_with_another_grid_agrees(convert_tiny: Any) -> None:
    found = compare(convert_tiny("llama2-7b", grid=MODELS["llama2-7b"].vit.grid + 2))
    assert "Q-Former" not in found.stages
    assert found.broken == []
    assert found.agreeing == NEW_TOKENS


@pytest.mark.parametrize("kind", ["blip_2", "instructblip"])
def test_the_towers_of_hugging_face_agree(convert_tiny: Any, kind: Any, tmp_path: Path) -> None:
    """Both in one folder, as transformers' own modules name their weights."""
    vision, queries, tokens = blip2.make_torch(MODELS["vicuna-7b"], kind)
    arrays = {f"vision_model.{n}": x.numpy() for n, x in vision.state_dict().items()}
    arrays |= {f"qformer.{n}": x.numpy() for n, x in queries.state_dict().items()}
    (tmp_path / "blip").mkdir()
    save_file(arrays | {"query_tokens": tokens.numpy()}, tmp_path / "blip" / "model.safetensors")
    sources = dict.fromkeys(("vit", "qformer"), tmp_path / "blip")
    found = compare(convert_tiny(sources=sources))
    assert found.broken == []
    assert found.agreeing == NEW_TOKENS


def test_metas_form_is_refused_with_what_to_give(convert_tiny: Any, tmp_path: Path) -> None:
    folder = convert_tiny(language=meta)
    with pytest.raises(UserError, match="which transformers does not read"):
        compare(folder)
    (tmp_path / "hf").mkdir()
    given = {"llm": str(hugging_face(tmp_path / "hf")["llm"])}
    name, settings = ConvertConfig.of_folder(folder)
    found = compare_with_torch(folder, name, dataclasses.replace(settings, **given))
    assert found.broken == []


# --- planted mistakes -------------------------------------------------------------------------------------------------


def permute_rows_of_q(arrays: Arrays) -> None:
    """As if the rope rows of a Hugging Face folder had been put into Meta's order."""
    kernel = arrays["llama/layers/0/self_attn/q_proj/kernel"]
    order = np.arange(kernel.shape[1]).reshape(-1, 2, LLAMA.head_dim // 2).swapaxes(1, 2).ravel()
    arrays["llama/layers/0/self_attn/q_proj/kernel"] = np.ascontiguousarray(kernel[:, order])


def zero(name: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = np.zeros_like(arrays[name])

    return change


def swap(first: str, second: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[first], arrays[second] = arrays[second], arrays[first]

    return change


def spoil(folder: ModelFolder, file: str, change: Callable[[Arrays], None]) -> ModelFolder:
    path = Path(folder.path) / "weights" / f"{file}.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    return ModelFolder(folder.path)


def spoil_manifest(folder: ModelFolder, *keys: str, value: Any) -> None:
    path = Path(folder.path) / "manifest.json"
    manifest = json.loads(path.read_text())
    place = manifest["preset"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(manifest))
    (path.parent / "checksums.json").unlink()
    write_checksums(path.parent)


@pytest.mark.parametrize(
    ("file", "change", "stage"),
    [
        ("vit.blocks.1", zero("vit/blocks/1/attn/v_proj/bias"), "image tower"),
        ("ln_vision", zero("ln_vision/bias"), "ln_vision"),
        ("qformer.layer.0", zero("qformer/layer/0/cross_attention/o_proj/bias"), "Q-Former"),
        ("llama_proj", zero("llama_proj/bias"), "projection"),
        ("llama.layers.0", permute_rows_of_q, "language model, layer 1"),
        (
            "llama.layers.1",
            swap("llama/layers/1/mlp/gate_proj/kernel", "llama/layers/1/mlp/up_proj/kernel"),
            "language model, layer 2",
        ),
        ("llama", zero("llama/embed_tokens/embedding"), "prompt embedding"),
        ("llama", zero("llama/lm_head/kernel"), "logits"),
    ],
)
def test_a_mistake_in_the_weights_is_caught_at_its_stage(
    convert_tiny: Any, file: str, change: Callable[[Arrays], None], stage: str
) -> None:
    found = compare(spoil(convert_tiny(), file, change))
    assert found.broken[0] == stage
    with pytest.raises(UserError, match=f"differs by more than 0.0001 is {stage} "):
        found.require_same()


@pytest.mark.parametrize(
    ("keys", "value", "stage"),
    [
        (("image_mean",), [0.5, 0.5, 0.5], "pixels"),
        (("model", "vit", "norm_eps"), 1e-2, "image tower"),
        (("model", "ln_vision_eps"), 1e-2, "ln_vision"),
        (("model", "qformer", "norm_eps"), 1e-2, "Q-Former"),
        (("model", "llama", "norm_eps"), 1e-2, "language model, layer 1"),
        (("model", "llama", "rope_base"), 1e3, "language model, layer 1"),
    ],
)
def test_a_mistake_in_the_manifest_is_caught_at_its_stage(
    convert_tiny: Any, keys: tuple[str, ...], value: Any, stage: str
) -> None:
    folder = convert_tiny()
    spoil_manifest(folder, *keys, value=value)
    assert compare(ModelFolder(folder.path)).broken[0] == stage


def test_a_wrong_table_passes_the_bits_and_is_caught_here(
    convert_tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The biases of q and v swapped in the table itself, so that folder and sources agree."""
    right, swapped = eva_vit.eva_rules, {"attn.q_bias": "attn.v_bias", "attn.v_bias": "attn.q_bias"}

    def wrong(*args: Any) -> tuple[Rule, ...]:
        def other(name: str) -> str:
            return next((name.replace(a, b) for a, b in swapped.items() if a in name), name)

        return tuple(
            dataclasses.replace(rule, sources=tuple(map(other, rule.sources)))
            for rule in right(*args)
        )

    monkeypatch.setattr(eva_vit, "eva_rules", wrong)
    folder = convert_tiny()
    capsys.readouterr()
    assert cli.main(["verify", folder.path]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert cli.main(["verify", folder.path, "--against-torch"]) == 2
    said = capsys.readouterr()
    assert "differs" in said.out
    assert "the first stage that differs by more than 0.0001 is image tower" in said.err


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_every_stage(
    convert_tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_out", Console(width=120))
    folder = convert_tiny()
    picture = Path(__file__).parents[2] / "examples" / "coffee.jpg"
    command = ["verify", folder.path, "--against-torch", "--picture", str(picture)]
    assert cli.main([*command, "--prompt", "a cat"]) == 0
    printed = capsys.readouterr().out
    assert "bit for bit" in printed
    assert f"{NEW_TOKENS} of {NEW_TOKENS} agree" in printed
    assert "differs" not in printed


def test_a_picture_without_the_comparison_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "anywhere", "--picture", "cat.jpg"]) == 2
    assert "--picture is for --against-torch" in capsys.readouterr().err


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'minigpt4-jax\[parity\]'"):
        torch_side._oracle()


# --- the measure ------------------------------------------------------------------------------------------------------


def test_the_difference_is_that_of_the_worst_token_by_its_own_size() -> None:
    theirs = np.array([[[1000.0, 1.0], [2.0, 1.0]]])
    ours = theirs + np.array([[[0.1, 0.0], [0.0, 0.1]]])
    assert difference(ours, theirs) == pytest.approx(0.05)
    assert difference(ours[:, :1], theirs) == np.inf
    assert not difference(np.full_like(theirs, np.nan), theirs) <= BAR


def test_a_token_agrees_if_it_is_the_same_or_as_likely() -> None:
    theirs = np.zeros((1, 3, 4))
    theirs[0, 1, 2], theirs[0, 1, 3] = 1.0, 1 - BAR / 2
    theirs[0, 2, 0] = 1.0
    same = against_torch._agreeing(theirs, theirs, [2, 0], start=1)
    assert same == 2
    tie, other = theirs.copy(), theirs.copy()
    tie[0, 1, 3] = 2.0
    other[0, 1, 1] = 2.0
    assert against_torch._agreeing(tie, theirs, [2, 0], start=1) == 2
    assert against_torch._agreeing(other, theirs, [2, 0], start=1) == 1
    assert Comparison(stages={"pixels": 0.0}, agreeing=1).broken == []
    with pytest.raises(UserError, match="Only 1 of 16 greedy tokens agree"):
        Comparison(stages={"pixels": 0.0}, agreeing=1).require_same()
