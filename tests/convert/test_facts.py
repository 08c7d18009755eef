"""`inspect` says of every kind of file what it is, how large, and where it goes, without reading its values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from convert.detect import Kind
from convert.facts import FileFacts, describe_file, fact_rows, print_facts
from convert.projection import ProjectionInfo, write_projection
from convert.sources import SafetensorsSource
from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.model_folder import manifest_of
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests.torch_files import write_pth

Arrays = dict[str, np.ndarray]


def zeros(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    return {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}


def eva(blocks: int, width: int = 1408, patch: int = 14) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 257, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
    }
    return zeros(shapes | {f"blocks.{i}.attn.qkv.weight": (3, 2) for i in range(blocks)})


def test_image_tower_with_its_unused_block(tmp_path: Path) -> None:
    facts = describe_file(write_pth(tmp_path / "eva_vit_g.pth", eva(40)))
    assert (facts.kind, facts.options) == (Kind.EVA_VIT, ("--vit",))
    assert facts.sizes | {"grid": ""} == {"width": 1408, "patch": 14, "blocks": 40, "grid": ""}
    assert str(facts.sizes["grid"]).startswith("16 x 16")
    assert "llama2-7b" in facts.fits
    assert facts.dtypes == {"float16": 43}
    assert not describe_file(write_pth(tmp_path / "b.pth", eva(12))).fits


def test_qformer_file_and_a_blip2_folder(tmp_path: Path) -> None:
    sizes = PRESETS["tiny-qformer"].model.qformer
    assert sizes is not None
    queries, width, layers = sizes.num_queries, sizes.width, sizes.num_layers
    dense = "attention.output.dense.weight"
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, queries, width),
        "ln_vision.weight": (7,),
    }
    shapes |= {f"Qformer.bert.encoder.layer.{i}.{dense}": (width, 6) for i in range(layers)}
    file = write_pth(tmp_path / "blip2.pth", zeros(shapes), under="model")
    facts = describe_file(file)
    assert (facts.kind, facts.options) == (Kind.QFORMER, ("--qformer",))
    assert facts.sizes == {"queries": queries, "width": width, "layers": layers}
    assert facts.fits == ("tiny-qformer",)
    folder = tmp_path / "blip2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "blip-2"}')
    shapes = {"query_tokens": (1, 8, 6), "vision_model.embeddings.patch_embedding.weight": (6, 3)}
    save_file(zeros(shapes), folder / "model.safetensors")
    facts = describe_file(folder)
    assert (facts.kind, facts.options) == (Kind.BLIP2, ("--vit", "--qformer"))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta", "gguf"])
def test_language_model_in_every_form(kind: str, tmp_path: Path) -> None:
    arrays = forms.draw()
    theirs = forms.to_meta(arrays, heads=4, kv_heads=2)
    if kind == "gguf":
        path = forms.write_gguf(tmp_path / "m.gguf", theirs)
    elif kind == "meta":
        path = forms.write_meta(tmp_path / "m", theirs)
    else:
        path = forms.write_hugging_face(tmp_path / "m", arrays, kind=kind)
    facts = describe_file(path)
    assert (facts.kind, facts.options) == (Kind.LLAMA, ("--llm",))
    config = forms.LLAMA
    assert facts.sizes == {
        "tokens": config.vocab_size,
        "width": config.width,
        "layers": config.num_layers,
        "mlp": config.mlp_width,
    }
    parameters = sum(x.size for name, x in arrays.items() if not name.endswith("inv_freq"))
    assert facts.num_parameters == parameters
    assert any("its norms scale by" in note for note in facts.notes)
    # Only Meta's files lack a number that the conversion needs, and that is said.
    assert any("max_seq_len" in note for note in facts.notes) == (kind == "meta")


def test_smol_language_model_fits_its_preset(
    tmp_path: Path, gguf_arrays: Arrays, write_gguf: Callable[..., Path]
) -> None:
    assert describe_file(write_gguf(tmp_path / "m.gguf", gguf_arrays)).fits[:1] == ("tiny",)


def test_delta_is_told_from_a_model(tmp_path: Path) -> None:
    arrays = {name: x / 100 for name, x in forms.draw().items()}
    facts = describe_file(forms.write_hugging_face(tmp_path / "delta", arrays))
    assert (facts.kind, facts.options) == (Kind.DELTA, ("--delta",))


def test_one_shard_is_told_to_be_a_part(tmp_path: Path) -> None:
    arrays = {n: x for n, x in forms.draw().items() if "norm" not in n}
    facts = describe_file(write_pth(tmp_path / "pytorch_model-00001-of-00002.bin", arrays))
    assert facts.kind is Kind.LLAMA
    assert facts.notes[:2] == (
        "one file of a language model; the converter takes its folder",
        "no norms in it, so that it may be of a delta as well",
    )


@pytest.mark.parametrize(
    ("tokens", "note"),
    [(32001, "32001 tokens: the mark of Vicuna v0"), (32000, "32000 tokens: LLaMA, Llama-2, or V")],
)
def test_number_of_tokens_tells_the_vicuna(tokens: int, note: str, tmp_path: Path) -> None:
    rows = np.ones((tokens, 2), np.float16)
    path = write_pth(tmp_path / "m.bin", {"model.embed_tokens.weight": rows})
    assert any(said.startswith(note) for said in describe_file(path).notes)


@pytest.mark.parametrize(
    ("shape", "model"),
    [
        ((4096, 768), "Vicuna-7B behind the Q-Former"),
        ((5120, 768), "Vicuna-13B behind the Q-Former"),
        ((4096, 5632), "Llama-2-7B without a Q-Former"),
        ((3, 2), "no model that is known here"),
    ],
)
def test_released_projection_says_which_model_it_belongs_to(
    shape: tuple[int, int], model: str, tmp_path: Path
) -> None:
    arrays = zeros({"llama_proj.weight": shape, "llama_proj.bias": shape[:1]})
    facts = describe_file(write_pth(tmp_path / "p.pth", arrays, under="model"))
    assert (facts.kind, facts.options) == (Kind.PROJECTION, ("--projection",))
    assert facts.notes[-1].startswith(f"it belongs to {model}")
    named = {(4096, 768): "vicuna-7b", (5120, 768): "vicuna-13b", (4096, 5632): "llama2-7b"}
    assert facts.fits == ((named[shape],) if shape in named else ())
    arrays["Qformer.bert.embeddings.position_ids"] = np.arange(4)[None]
    trained = describe_file(write_pth(tmp_path / "t.pth", arrays, under="model"))
    assert trained.kind is Kind.TRAINER
    assert trained.num_parameters == facts.num_parameters
    assert trained.notes[0] == "beside the weights, not read: epoch"


def test_projection_of_this_project_fits_its_preset(
    tmp_path: Path, tiny_config: ModelConfig
) -> None:
    kernel = np.zeros((tiny_config.projection_in, tiny_config.llama.width), np.float32)
    info = ProjectionInfo(config=tiny_config, licence="", attribution="", frozen_parts={})
    tree = {"kernel": kernel, "bias": kernel[0]}
    write_projection(tmp_path / "p.safetensors", tree, info=info)
    facts = describe_file(tmp_path / "p.safetensors")
    assert (facts.kind, facts.fits) == (Kind.OUR_PROJECTION, ("tiny",))
    assert facts.sizes == {"in": tiny_config.projection_in, "out": tiny_config.llama.width}


@pytest.mark.parametrize(
    ("spelling", "names"), [("lora_A.weight", "peft 0.2"), ("lora_A.default.weight", "later peft")]
)
def test_minigpt_v2_checkpoint_has_no_option_yet(spelling: str, names: str, tmp_path: Path) -> None:
    arrays = zeros({"llama_proj.weight": (4, 6), f"llama_model.q_proj.{spelling}": (2, 4)})
    facts = describe_file(write_pth(tmp_path / "v2.pth", arrays, under="model"))
    assert (facts.kind, facts.options) == (Kind.MINIGPT_V2, ())
    assert facts.sizes["LoRA names"] == names


def test_tokenizers_and_folders_of_this_project(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert describe_file(tmp_path / "tokenizer.model").kind is Kind.TOKENIZER
    assert describe_file(tmp_path).kind is Kind.TOKENIZER
    (tmp_path / "weights").mkdir()
    arrays = {"llama_proj/kernel": np.ones((4, 3), np.float16), "llama_proj/bias": np.ones(3)}
    save_file(arrays, tmp_path / "weights" / "llama_proj.safetensors")
    sources = {"llama_proj": {"files": [{"name": "proj.pth"}]}, "ln_vision": {"files": []}}
    manifest = manifest_of(PRESETS["tiny"], sources, {})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_checksums(tmp_path)
    facts = describe_file(tmp_path)
    assert facts.kind is Kind.MODEL_FOLDER
    assert (facts.num_tensors, facts.num_parameters) == (2, 15)
    assert facts.dtypes == {"float16": 1, "float64": 1}
    assert facts.notes == ("llama_proj from proj.pth",)


def test_unknown_file_shows_what_it_holds(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    facts = describe_file(tmp_path / "x.safetensors")
    assert (facts.kind, facts.notes) == (Kind.UNKNOWN, ("its first tensors: a.weight",))


def test_nothing_and_a_damaged_file_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no"):
        describe_file(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x\.safetensors"):
        describe_file(tmp_path / "x.safetensors")


def test_only_norms_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = SafetensorsSource.get

    def counted(source: SafetensorsSource, name: str) -> np.ndarray:
        read.append(name)
        return get(source, name)

    monkeypatch.setattr(SafetensorsSource, "get", counted)
    describe_file(forms.write_hugging_face(tmp_path / "m", forms.draw()))
    assert len(read) == 5
    assert all("norm" in name for name in read)


def test_table_shows_every_row(tmp_path: Path) -> None:
    facts = FileFacts(
        path=tmp_path, kind=Kind.QFORMER, sizes={"width": 6}, num_tensors=2, num_parameters=1234,
        dtypes={"float16": 2}, notes=("a [note]",),
    )  # fmt: skip
    console = Console(width=200, record=True)
    print_facts(facts, console)
    text = console.export_text()
    for label, value in fact_rows(facts):
        assert label in text
        assert value in text
    assert "1,234" in text
    assert "no preset" in text
