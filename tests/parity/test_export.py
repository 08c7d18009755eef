"""An exported folder is what `transformers` takes for a LLaMA: same tensors, same logits as the folder it came from.

Needs the `parity` extra.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.export import PART, export_llama
from convert.llama import hf_config, hf_excuses, hf_rules
from convert.rules import convert, flatten
from convert.sources import ArraySource, open_source
from convert.tokenizer import convert_tokenizer
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests.tiny_tokenizer import tiny_pieces, write_model

SIZES = {
    "vocab_size": len(tiny_pieces()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def quietly(make: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and torch say about themselves
        return make()


def round_trip(folder: Path, out: Path) -> None:
    """Hugging Face -> the tree -> Hugging Face, in several shards."""
    llama = hf_config(folder)
    config = dataclasses.replace(PRESETS["tiny"].model, llama=llama)
    done = convert(
        open_source(folder),
        hf_rules(llama),
        excuses=hf_excuses(llama),
        target=abstract_params(config)["llama"],
    )
    source = ArraySource({PART + path: value for path, value in flatten(done.params)})
    write_model(folder.parent / "words" / "tokenizer.model")
    convert_tokenizer(
        folder.parent / "words", folder.parent / "converted", vocab_size=llama.vocab_size
    )
    words = folder.parent / "converted"
    export_llama(source, out, config=config, tokenizer=words, shard_bytes=20_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "head_dim": 16},
    ],
    ids=["mha", "tied-gqa", "rope-head_dim"],
)
def test_transformers_loads_an_exported_folder_with_the_same_weights_and_logits(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).to(dtype)
    with torch.no_grad():
        for weights in made.parameters():  # norms that are not all ones, too
            weights.normal_(1.0 if weights.ndim == 1 else 0.0, 0.1)
    quietly(lambda: made.save_pretrained(tmp_path / "hf"))
    round_trip(tmp_path / "hf", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    original, found = (
        quietly(
            lambda name=name: AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        )
        for name in ("hf", "out")
    )
    assert type(found) is LlamaForCausalLM
    assert found.dtype == dtype
    theirs, ours = original.state_dict(), found.state_dict()
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        assert torch.equal(x, ours[name]), name
    ids = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(original(ids).logits, found(ids).logits)
    written = open_source(tmp_path / "hf")
    back = open_source(tmp_path / "out")
    for name in written.names():
        assert written.get(name).tobytes() == back.get(name).tobytes(), name


def test_ids_of_the_exported_configs_are_what_transformers_generates_with(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    original = LlamaForCausalLM(LlamaConfig(**SIZES))
    quietly(lambda: original.save_pretrained(tmp_path / "hf"))
    round_trip(tmp_path / "hf", tmp_path / "out")
    model = quietly(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    words = quietly(lambda: AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert (words.bos_token, words.eos_token, words.pad_token) == ("<s>", "</s>", "$$")
    assert words("a cat").input_ids[0] == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
