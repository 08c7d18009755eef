"""The language models of a set in their other forms: `.bin`, Meta's shards and a delta made from them give one tree.

And every weight file of the set is told for what it is. That the tree itself is right, `test_golden_llama.py` shows.
Everything is compared bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.detect import OPTIONS, TAKES, require_option
from convert.facts import describe_file
from convert.llama_files import OpenedLlama, open_llama
from convert.projection import read_projection
from convert.rules import convert, flatten
from convert.sources import open_source
from minigpt4_jax.config import UserError
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms


def tree_of(model: OpenedLlama) -> dict[str, np.ndarray]:
    target = abstract_params(dataclasses.replace(PRESETS["tiny"].model, llama=model.config))
    done = convert(model.source, model.rules, excuses=model.excuses, target=target["llama"])
    return dict(flatten(done.params))


def require_equal(found: OpenedLlama, expected: OpenedLlama) -> None:
    assert found.config == expected.config
    ours, theirs = tree_of(found), tree_of(expected)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert ours[path].dtype == value.dtype, path
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


def arrays_of(model: OpenedLlama) -> forms.Arrays:
    return {name: model.source.get(name) for name in model.source.names()}


def test_golden_bin_and_safetensors_give_one_tree(
    golden: Any, llama_bin_folder: str, tmp_path: Path
) -> None:
    folder = golden.folder / llama_bin_folder
    for file in (folder / "config.json", *folder.glob("pytorch_model*")):
        (tmp_path / file.name).symlink_to(file)
    found, expected = open_llama(tmp_path), open_llama(folder)
    assert {path.suffix for path in found.source.files()} == {".bin"}
    assert {path.suffix for path in expected.source.files()} == {".safetensors"}
    require_equal(found, expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_golden_meta_shards_give_the_tree_of_hugging_face(
    golden: Any, untied_llama_folder: str, shards: int, tmp_path: Path
) -> None:
    """The set's model, written as Meta writes it. A size that two shards cannot share equally stays in one."""
    expected = open_llama(golden.folder / untied_llama_folder)
    config = expected.config
    rows = config.num_kv_heads * config.head_dim
    sizes = (config.width, config.mlp_width, config.vocab_size, rows)
    shards = shards if all(size % shards == 0 for size in sizes) else 1
    params = forms.params_json(
        config,
        # Any width of the MLP by Meta's formula: half of it, rounded up to a multiple of it.
        multiple_of=config.mlp_width,
        ffn_dim_multiplier=config.mlp_width / 2 / int(8 * config.width / 3),
        rope_theta=config.rope_base,
        max_seq_len=config.max_positions,
    )
    theirs = forms.to_meta(
        arrays_of(expected), heads=config.num_heads, kv_heads=config.num_kv_heads
    )
    require_equal(
        open_llama(forms.write_meta(tmp_path, theirs, params=params, shards=shards)), expected
    )


@pytest.mark.parametrize("fewer_rows", [0, 1], ids=["v1.1", "v0"])
def test_golden_base_and_delta_give_the_tree_of_the_merged_model(
    golden: Any, llama_folder: str, fewer_rows: int, tmp_path: Path
) -> None:
    """The base has the upper bits of every number, the delta the rest: their sum is exact."""
    folder = golden.folder / llama_folder
    expected = open_llama(folder)
    merged, base = arrays_of(expected), {}
    for name, x in merged.items():
        assert x.dtype == np.float32
        coarse = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        base[name] = coarse[: len(coarse) - fewer_rows * grown]
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    found = open_llama(
        forms.write_hugging_face(
            tmp_path / "base", base, config=config | {"vocab_size": rows - fewer_rows}
        ),
        delta=forms.write_hugging_face(
            tmp_path / "delta", forms.as_delta(merged, base), config=config, kind="bin"
        ),
    )
    require_equal(found, expected)


def test_golden_weight_files_are_told_apart(golden: Any, weight_file: tuple[str, str]) -> None:
    name, option = weight_file
    facts = describe_file(golden.folder / name)
    assert facts.options == ((option,) if option else ())
    assert OPTIONS[facts.kind] == facts.options
    assert facts.num_parameters > 0
    source = open_source(golden.folder / name)
    for other in TAKES:
        if other == option:
            require_option(source, other)
        elif (option, other) != ("--llm", "--delta"):  # these are told apart by values
            with pytest.raises(UserError, match=f"was given as {other}, but it is"):
                require_option(source, other)


def test_golden_minigpt_v2_is_refused_as_a_projection(golden: Any, v2_checkpoint: str) -> None:
    """In both spellings of its LoRA."""
    with pytest.raises(UserError, match=r"LoRA tensors, such as .*lora_[AB]\."):
        read_projection(golden.folder / v2_checkpoint, PRESETS["tiny"].model)
