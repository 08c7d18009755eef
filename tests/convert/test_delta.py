"""A base plus a delta is the merged model, v0 and v1.1, and what does not fit is listed.

Each fault makes a test fail: rows that are shifted or dropped, a side that is taken alone
(`test_base_and_delta_give_the_merged_model`), a wrong rounding (`test_sum_is_rounded_once`), a missing tensor
(`test_tensors_of_one_side_are_all_listed`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import delta as sums
from convert.delta import DeltaSource
from convert.llama import hf_excuses
from convert.llama_files import open_llama
from convert.sources import ArraySource
from minigpt4_jax.config import UserError
from tests import llama_forms as forms

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def small(arrays: forms.Arrays, *, more_rows: int = 0) -> forms.Arrays:
    """A delta for `arrays`: small numbers, and more rows of embedding and head."""
    rng = np.random.default_rng(7)
    drawn = {}
    for name, x in arrays.items():
        rows = len(x) + more_rows * (name in sums.GROWN)
        drawn[name] = (0.01 * rng.normal(size=(rows, *x.shape[1:]))).astype(x.dtype)
    return drawn


def summed(base: forms.Arrays, delta: forms.Arrays) -> DeltaSource:
    return DeltaSource(ArraySource(base), ArraySource(delta), excuses=hf_excuses(forms.LLAMA))


@pytest.mark.parametrize("block", [sums.BLOCK, 100])
@pytest.mark.parametrize("more_rows", [0, 1])
def test_base_and_delta_give_the_merged_model(
    monkeypatch: pytest.MonkeyPatch, more_rows: int, block: int
) -> None:
    """v1.1 has the rows of its base; v0 has one more, which the base has as zero. In blocks or at once."""
    monkeypatch.setattr(sums, "BLOCK", block)
    base = forms.draw()
    delta = small(base, more_rows=more_rows)
    source = summed(base, delta)
    assert set(source.names()) == set(base)
    for name, x in base.items():
        zeros = np.zeros((len(delta[name]) - len(x), *x.shape[1:]), x.dtype)
        expected = np.concatenate([x, zeros]) + delta[name]
        value = source.get(name)
        assert (source.shape(name), source.dtype(name)) == (expected.shape, expected.dtype)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected, err_msg=name)


@pytest.mark.parametrize(
    ("ours", "theirs", "result"),
    [
        (np.float16, np.float16, np.float16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.float32, np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float16, np.float32),
    ],
)
def test_sum_is_rounded_once(ours: Any, theirs: Any, result: Any) -> None:
    rng = np.random.default_rng(3)
    base, delta = rng.normal(size=(40, 50)).astype(ours), rng.normal(size=(40, 50)).astype(theirs)
    source = DeltaSource(ArraySource({"x": base}), ArraySource({"x": delta}), excuses=())
    exact = base.astype(np.float32) + delta.astype(np.float32)
    assert source.dtype("x") == np.dtype(result)
    np.testing.assert_array_equal(source.get("x"), exact.astype(result))


def test_buffers_may_be_on_one_side() -> None:
    base = forms.draw()
    delta = small(base)
    kept = delta.pop(INV_FREQ) * 0 + base[INV_FREQ]
    np.testing.assert_array_equal(summed(base, delta).get(INV_FREQ), kept)
    del base[INV_FREQ]
    delta[INV_FREQ] = kept
    source = summed(base, delta)
    np.testing.assert_array_equal(source.get(INV_FREQ), kept)
    assert source.shape(INV_FREQ) == kept.shape
    assert source.dtype(INV_FREQ) == np.float32


def test_tensors_of_one_side_are_all_listed() -> None:
    base = forms.draw()
    delta = small(base)
    for i in range(forms.LLAMA.num_layers):
        del delta[f"model.layers.{i}.mlp.up_proj.weight"]
    del base["model.norm.weight"]
    with pytest.raises(UserError) as error:
        summed(base, delta)
    assert "3 tensor(s) do not fit" in str(error.value)
    assert "model.layers.*.mlp.up_proj.weight is only in the base (layers 0, 1)" in str(error.value)
    assert "model.norm.weight is only in the delta" in str(error.value)


def without_head(arrays: forms.Arrays) -> forms.Arrays:
    return arrays | {"lm_head.weight": arrays["lm_head.weight"][:-1]}


@pytest.mark.parametrize("more_rows", [-1, 2])
def test_other_numbers_of_rows_are_refused(more_rows: int) -> None:
    base = forms.draw()
    delta = small(base)
    for name in sums.GROWN:
        rows = len(base[name]) + more_rows
        delta[name] = np.zeros((rows, base[name].shape[1]), np.float16)
    with pytest.raises(UserError, match=r"2 tensor\(s\).*\n.*embed_tokens\.weight is \[384, 32\]"):
        summed(base, delta)


def test_embedding_and_head_grow_together() -> None:
    base = forms.draw()
    delta = without_head(small(base, more_rows=1))
    with pytest.raises(UserError, match=r"embed_tokens\.weight is \[384, 32\].* \[385, 32\]"):
        summed(base, delta)


def test_delta_of_another_size_lists_its_shapes() -> None:
    wider = forms.draw(dataclasses.replace(forms.LLAMA, mlp_width=64))
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight is \[96, 32\].* \[64, 32\]"):
        summed(forms.draw(), small(wider))


def test_value_that_float16_cannot_hold_is_infinite_and_not_wrapped() -> None:
    x = np.full((2, 2), 6e4, np.float16)
    source = DeltaSource(ArraySource({"x": x}), ArraySource({"x": x}), excuses=())
    assert np.isinf(source.get("x")).all()


# --- whole folders ----------------------------------------------------------------------------------------------------


def v0_folders(tmp_path: Path) -> tuple[Path, Path]:
    base = forms.draw()
    delta = small(base, more_rows=1)
    rows = forms.LLAMA.vocab_size + 1
    return (
        forms.write_hugging_face(tmp_path / "base", base),
        forms.write_hugging_face(
            tmp_path / "delta", delta, config=forms.hf_json(vocab_size=rows), kind="bin"
        ),
    )


def test_v0_folders_give_a_model_of_one_token_more(tmp_path: Path) -> None:
    base, delta = v0_folders(tmp_path)
    model = open_llama(base, delta=delta)
    assert model.config == dataclasses.replace(forms.LLAMA, vocab_size=forms.LLAMA.vocab_size + 1)
    assert model.source.shape("model.embed_tokens.weight")[0] == model.config.vocab_size
    assert len(model.source.files()) == 4


def test_delta_is_added_to_files_of_meta(tmp_path: Path) -> None:
    """The delta has Hugging Face's names and rope order; positions come from its config."""
    base, delta = v0_folders(tmp_path)
    theirs = forms.to_meta(forms.draw(), heads=4, kv_heads=2)
    meta = forms.write_meta(tmp_path / "meta", theirs)
    expected, found = open_llama(base, delta=delta), open_llama(meta, delta=delta)
    assert found.config == expected.config
    for rule in found.rules:
        for name in (n.replace("{i}", "1") for n in rule.sources):
            np.testing.assert_array_equal(found.source.get(name), expected.source.get(name))


def test_base_and_delta_that_were_swapped_are_told(tmp_path: Path) -> None:
    base, delta = v0_folders(tmp_path)
    with pytest.raises(UserError, match=r"is a delta, not a model.*this with --delta"):
        open_llama(delta, delta=base)
    with pytest.raises(UserError, match="is a delta, not a model"):
        open_llama(delta)


def test_model_given_as_a_delta_is_told(tmp_path: Path) -> None:
    base, _ = v0_folders(tmp_path)
    with pytest.raises(UserError, match="given as --delta, but it is a whole model"):
        open_llama(base, delta=base)


def test_delta_of_another_config_is_refused(tmp_path: Path) -> None:
    base, _ = v0_folders(tmp_path)
    other = forms.write_hugging_face(
        tmp_path / "other", small(forms.draw()), config=forms.hf_json(rms_norm_eps=1e-3)
    )
    with pytest.raises(UserError, match=r"different models: norm_eps 1e-05 and 0\.001"):
        open_llama(base, delta=other)


def test_quantised_base_is_refused(tmp_path: Path) -> None:
    _, delta = v0_folders(tmp_path)
    theirs = forms.to_meta(forms.draw(), heads=4, kv_heads=2)
    with pytest.raises(UserError, match="a delta is added to the weights it was made from"):
        open_llama(forms.write_gguf(tmp_path / "m.gguf", theirs), delta=delta)


def test_delta_that_is_a_file_is_refused(tmp_path: Path) -> None:
    base, delta = v0_folders(tmp_path)
    with pytest.raises(UserError, match="is no folder; expected a Vicuna delta"):
        open_llama(base, delta=delta / "config.json")
