"""Whatever a person has as a language model is opened by one call, or refused with what to do.

One model in every form gives one tree (`test_every_form_gives_the_same_tree`): a transposed kernel, a wrong rope order,
swapped or dropped tensors of any form fail there.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.llama_files import open_llama
from convert.rules import convert, flatten
from minigpt4_jax.config import UserError
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests.torch_files import write_pth

FORMS = (
    "one safetensors",
    "safetensors",
    "one bin",
    "bin",
    "one meta shard",
    "meta",
    "gguf",
    "delta",
)


def write(form: str, folder: Path, arrays: forms.Arrays) -> dict[str, Path]:
    """The arguments of `open_llama`."""
    shards = 1 if form.startswith("one") else 2
    if "meta" in form or form == "gguf":
        theirs = forms.to_meta(
            arrays, heads=forms.LLAMA.num_heads, kv_heads=forms.LLAMA.num_kv_heads
        )
        if form == "gguf":
            return {"path": forms.write_gguf(folder / "m.gguf", theirs)}
        params = forms.params_json(max_seq_len=forms.LLAMA.max_positions)
        return {"path": forms.write_meta(folder / "m", theirs, params=params, shards=shards)}
    if form == "delta":
        # Fewer bits in the base, the others in the delta: their sum is exact.
        base = {
            n: x.view(np.uint16) & np.uint16(0xFFE0) for n, x in arrays.items() if x.itemsize == 2
        }
        halves = {n: x.view(np.float16) for n, x in base.items()}
        delta = forms.as_delta({n: arrays[n] for n in halves}, halves)
        return {
            "path": forms.write_hugging_face(folder / "base", halves),
            "delta": forms.write_hugging_face(folder / "delta", delta, kind="bin"),
        }
    kind = form.split()[-1]
    return {"path": forms.write_hugging_face(folder / "m", arrays, kind=kind, shards=shards)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tree(form: str, tmp_path: Path) -> None:
    arrays = forms.draw()
    model = open_llama(**write(form, tmp_path, arrays))
    assert model.config == forms.LLAMA
    assert not model.notes
    target = abstract_params(dataclasses.replace(PRESETS["tiny"].model, llama=forms.LLAMA))["llama"]
    done = convert(model.source, model.rules, excuses=model.excuses, target=target)
    found = dict(flatten(done.params))
    expected = {
        "embed_tokens/embedding": arrays["model.embed_tokens.weight"],
        "norm/scale": arrays["model.norm.weight"],
        "lm_head/kernel": arrays["lm_head.weight"].T,
    }
    for name, x in arrays.items():
        if name.startswith("model.layers.") and not name.endswith("inv_freq"):
            path = name.removeprefix("model.").removesuffix(".weight").replace(".", "/")
            expected |= {f"{path}/kernel": x.T} if x.ndim == 2 else {f"{path}/scale": x}
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
        if form != "gguf" or value.ndim == 2:  # llama.cpp stores norms as float32
            assert found[path].dtype == np.float16, path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "gguf"])
def test_dtype_of_every_tensor_is_kept(kind: str, dtype: Any, tmp_path: Path) -> None:
    """config.json says bfloat16 of all of them: it is not asked."""
    path = write(kind, tmp_path, forms.draw(dtype=dtype))["path"]
    source = open_llama(path).source
    for name in source.names():
        if len(source.shape(name)) == 2:
            assert source.dtype(name) == source.get(name).dtype == np.dtype(dtype)


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def test_safetensors_are_read_where_both_kinds_lie_and_it_is_said(tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw())
    forms.write_hugging_face(folder, forms.draw(seed=1), kind="bin")
    model = open_llama(folder)
    assert {path.suffix for path in model.source.files()} == {".safetensors"}
    assert model.notes == (
        f"{folder} holds .safetensors and .bin files: the .safetensors are read",
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_and_an_index_of_one_kind_are_refused(kind: str, tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw(), kind=kind)
    forms.write_hugging_face(folder, forms.draw(), kind=kind, shards=1)
    with pytest.raises(UserError, match="they may be two models"):
        open_llama(folder)


@pytest.mark.parametrize("odd", ["pytorch_model-00002-of-00002.bin", "../other/model.safetensors"])
def test_index_that_names_other_files_is_refused(odd: str, tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = odd
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"names {odd}; expected .safetensors files beside it"):
        open_llama(folder)


def test_index_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw())
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        open_llama(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_missing_shard_is_named(kind: str, tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw(), kind=kind)
    (shard,) = folder.glob(f"*-00002-of-00002.{kind}")
    shard.unlink()
    with pytest.raises(UserError, match=f"not there: {shard.name}"):
        open_llama(folder)


def test_shards_without_an_index_are_named(tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw())
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UserError, match=r"has model-00001-of-00002\.safetensors, .* without an ind"
    ):
        open_llama(folder)


@pytest.mark.parametrize("said", [forms.LLAMA.vocab_size + 1, 32000])
def test_vocabulary_that_the_config_says_otherwise_is_refused(said: int, tmp_path: Path) -> None:
    folder = forms.write_hugging_face(
        tmp_path / "m", forms.draw(), config=forms.hf_json(vocab_size=said)
    )
    with pytest.raises(
        UserError, match=rf"says vocab_size {said}, .* has 384 rows.*\"vocab_size\""
    ):
        open_llama(folder)


def test_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = forms.write_hugging_face(
        tmp_path / "m", forms.draw(), config=forms.hf_json(model_type="mistral")
    )
    with pytest.raises(UserError, match="model_type is 'mistral', expected 'llama'"):
        open_llama(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_config_that_cannot_be_read_is_said(content: str, tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw())
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json (is no JSON|holds no table)"):
        open_llama(folder)


def test_names_of_the_first_conversions_are_known(tmp_path: Path) -> None:
    """They say `max_sequence_length`; without any word the format's default holds."""
    config = forms.hf_json(max_sequence_length=512)
    del config["max_position_embeddings"], config["num_key_value_heads"]
    llama = dataclasses.replace(forms.LLAMA, num_kv_heads=forms.LLAMA.num_heads)
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw(llama), config=config)
    assert open_llama(folder).config == dataclasses.replace(llama, max_positions=512)
    del config["max_sequence_length"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_llama(folder).config.max_positions == 2048


# --- what else a person gives -----------------------------------------------------------------------------------------


def test_two_forms_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = forms.write_hugging_face(tmp_path / "m", forms.draw())
    forms.write_meta(folder, forms.to_meta(forms.draw(), heads=4, kv_heads=2))
    with pytest.raises(UserError, match=r"holds both consolidated\.\*\.pth .*Put one of them"):
        open_llama(folder)


def test_one_file_of_a_folder_is_told_to_give_the_folder(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "consolidated.00.pth", {"a": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=rf"is one file; .* Give its folder {tmp_path}"):
        open_llama(path)


def test_nothing_and_an_empty_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no .*; expected a LLaMA, Vicuna or Llama-2"):
        open_llama(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"There is no .*config\.json"):
        open_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(forms.hf_json()))
    with pytest.raises(UserError, match="holds no weights under the names of Hugging Face"):
        open_llama(tmp_path)


def test_gguf_without_a_rope_base_has_that_of_llama(tmp_path: Path) -> None:
    """llama.cpp leaves it out where config.json does, as LLaMA 1 and 2 do."""
    theirs = forms.to_meta(forms.draw(), heads=4, kv_heads=2)
    assert open_llama(forms.write_gguf(tmp_path / "a.gguf", theirs)).config.rope_base == 10000.0
    other = forms.write_gguf(tmp_path / "b.gguf", theirs, rope_freq_base=5e5)
    assert open_llama(other).config.rope_base == 5e5
