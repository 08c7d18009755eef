"""Meta's shards give the tree of the Hugging Face folder they were converted to, bit for bit, or are refused.

Each fault that the table can have makes a test fail here: a missing or wrong rope order of q or k, a tensor joined
along the wrong axis, a swapped pair, a dropped row (`test_two_shards_give_the_tree_of_the_hugging_face_folder`); a
missing shard (`test_missing_shard_is_named`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.llama import hf_rules
from convert.llama_files import open_llama
from convert.meta import META_EXCUSES, MetaSource, meta_config
from convert.problems import ConversionError
from convert.rules import convert, flatten
from minigpt4_jax.config import LlamaConfig, UserError
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests.torch_files import write_pth


def tree_of(folder: Path, **arguments: Any) -> dict[str, np.ndarray]:
    model = open_llama(folder, **arguments)
    target = abstract_params(dataclasses.replace(PRESETS["tiny"].model, llama=model.config))
    done = convert(model.source, model.rules, excuses=model.excuses, target=target["llama"])
    return dict(flatten(done.params))


def meta_arrays(config: LlamaConfig = forms.LLAMA, **changes: Any) -> forms.Arrays:
    arrays = forms.draw(config, **changes)
    return forms.to_meta(arrays, heads=config.num_heads, kv_heads=config.num_kv_heads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return forms.write_meta(tmp_path / "meta", meta_arrays())


def opened(folder: Path, **params: Any) -> LlamaConfig:
    (folder / "params.json").write_text(json.dumps(forms.params_json(**params)))
    return meta_config(MetaSource(folder), max_positions=64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_two_shards_give_the_tree_of_the_hugging_face_folder(
    tmp_path: Path, shards: int, kv_heads: int, dtype: Any
) -> None:
    config = dataclasses.replace(forms.LLAMA, num_kv_heads=kv_heads)
    arrays = forms.draw(config, dtype=dtype)
    expected = tree_of(
        forms.write_hugging_face(tmp_path / "hf", arrays, config=forms.hf_json(config))
    )
    theirs = forms.to_meta(arrays, heads=config.num_heads, kv_heads=kv_heads)
    meta = forms.write_meta(
        tmp_path / "meta", theirs, params=forms.params_json(config), shards=shards
    )
    found = tree_of(meta, max_positions=config.max_positions)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_shapes_and_dtypes_are_told_without_reading(folder: Path) -> None:
    source = MetaSource(folder)
    for name in source.names():
        value = source.get(name)
        assert (source.shape(name), source.dtype(name)) == (value.shape, value.dtype), name
    assert [path.name for path in source.files()] == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
    ]


def test_config_is_read_from_params_and_tensors(folder: Path) -> None:
    assert opened(folder) == dataclasses.replace(forms.LLAMA, max_positions=64)
    assert opened(folder, rope_theta=5e5).rope_base == 5e5
    assert opened(folder, vocab_size=forms.LLAMA.vocab_size).vocab_size == forms.LLAMA.vocab_size
    assert opened(folder, max_seq_len=4096).max_positions == 4096


def test_mlp_width_of_a_multiplier_is_checked_by_the_formula(tmp_path: Path) -> None:
    """Meta's Llama 2 70B has 1.3; here int(1.3 * int(8 * 32 / 3)) = 110, rounded up to 128."""
    config = dataclasses.replace(forms.LLAMA, mlp_width=128)
    folder = forms.write_meta(tmp_path / "meta", meta_arrays(config))
    assert opened(folder, ffn_dim_multiplier=1.3).mlp_width == 128
    with pytest.raises(UserError, match=r"w1 has 128 rows, params\.json .* gives 96"):
        opened(folder)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"vocab_size": 99}, "says vocab_size 99, the embedding has 384 rows"),
        ({"multiple_of": 256}, r"w1 has 96 rows, params\.json .* gives 256"),
        ({"use_scaled_rope": True}, "scales its rope"),
        ({"dim": 96}, r"holds 2 of 6 shards .* consolidated\.02\.pth"),
        ({"dim": 40}, r"of which each has 16 rows of wq; params\.json says 40"),
    ],
)
def test_params_that_contradict_the_tensors_are_refused(
    folder: Path, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(folder, **params)


def test_positions_that_nobody_said_are_not_guessed(folder: Path) -> None:
    with pytest.raises(UserError, match=r'does not say how many positions.*"max_seq_len": 2048'):
        open_llama(folder)


def test_size_that_params_do_not_say_is_named(folder: Path) -> None:
    params = forms.params_json()
    del params["norm_eps"]
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(UserError, match="does not say 'norm_eps'"):
        open_llama(folder, max_positions=64)


@pytest.mark.parametrize("number", [0, 1])
def test_missing_shard_is_named(folder: Path, number: int) -> None:
    (folder / f"consolidated.{number:02}.pth").unlink()
    with pytest.raises(UserError, match=rf"not .*consolidated\.{number:02}\.pth\. Fetch"):
        MetaSource(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "params.json cannot be read"), ("{", "is no JSON"), ("[]", "holds no table")],
)
def test_params_that_cannot_be_read_are_said(
    folder: Path, content: str | None, message: str
) -> None:
    (folder / "params.json").unlink()
    if content is not None:
        (folder / "params.json").write_text(content)
    with pytest.raises(UserError, match=message):
        MetaSource(folder)


def test_shards_of_unequal_shapes_are_named(tmp_path: Path, folder: Path) -> None:
    wider = dataclasses.replace(forms.LLAMA, mlp_width=64)
    forms.write_meta(tmp_path / "other", meta_arrays(wider))
    (tmp_path / "other" / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
    with pytest.raises(
        UserError, match=r"00\.pth and consolidated\.01\.pth have unequal shapes.*w1"
    ):
        MetaSource(folder)


def test_shards_with_other_names_are_refused(tmp_path: Path, folder: Path) -> None:
    deeper = dataclasses.replace(forms.LLAMA, num_layers=3)
    forms.write_meta(tmp_path / "other", meta_arrays(deeper))
    (tmp_path / "other" / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"only in consolidated\.01\.pth: layers\.2\.attention"):
        MetaSource(folder)


def test_shards_of_two_models_are_told_by_their_norms(tmp_path: Path, folder: Path) -> None:
    forms.write_meta(tmp_path / "other", meta_arrays(seed=1))
    (tmp_path / "other" / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"norm\.weight differs between consolidated\.00\.pth and"):
        open_llama(folder, max_positions=64)


def test_embedding_that_is_split_by_rows_is_refused(tmp_path: Path) -> None:
    """Llama 3 does so."""
    arrays = meta_arrays()
    folder = forms.write_meta(tmp_path / "meta", arrays)
    for number, half in enumerate(np.split(arrays["tok_embeddings.weight"], 2)):
        shard = {"layers.0.attention.wq.weight": arrays["layers.0.attention.wq.weight"][:16]}
        write_pth(folder / f"consolidated.{number:02}.pth", shard | {"tok_embeddings.weight": half})
    with pytest.raises(UserError, match=r"join to 64 columns.*Llama 3 is not built"):
        MetaSource(folder)


def test_file_with_other_names_is_no_meta_shard(tmp_path: Path) -> None:
    folder = forms.write_meta(tmp_path / "meta", meta_arrays(), shards=1)
    write_pth(folder / "consolidated.00.pth", {"a": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"has no layers\.0\.attention\.wq\.weight.*tensors: a\."):
        MetaSource(folder)


def test_dropped_and_unknown_tensors_are_both_listed(tmp_path: Path) -> None:
    arrays = meta_arrays()
    del arrays["layers.1.feed_forward.w3.weight"]
    arrays["layers.1.attention.inner_attention.rope.freqs"] = np.ones(4, np.float32)
    arrays["layers.1.attention.bias"] = np.ones(4, np.float16)
    folder = forms.write_meta(tmp_path / "meta", arrays, shards=1)
    with pytest.raises(ConversionError) as error:
        tree_of(folder, max_positions=64)
    assert {p.kind: p.text for p in error.value.problems} == {
        "missing in the source": "model.layers.1.mlp.up_proj.weight (for layers/1/mlp/up_proj/kernel)",
        "in the source, but used by no rule and excused by none": "layers.1.attention.bias [4]",
    }


def test_every_row_of_the_table_of_hugging_face_is_reached(folder: Path) -> None:
    source = MetaSource(folder)
    wanted = {name.replace("{i}", "0") for rule in hf_rules(forms.LLAMA) for name in rule.sources}
    assert wanted <= set(source.names())
    left = set(source.names()) - {name.replace("0", i) for name in wanted for i in "01"}
    assert left == {"rope.freqs"}
    assert any(excuse.matches("rope.freqs") for excuse in META_EXCUSES)
