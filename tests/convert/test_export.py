"""An exported language model has the very bytes of the folder that it came from, and what `transformers` asks for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import export
from convert.export import PART, export_llama
from convert.llama import hf_config, hf_excuses, hf_rules
from convert.rules import convert, flatten
from convert.sources import ArraySource, SafetensorsSource, open_source
from minigpt4_jax.config import LlamaConfig, ModelConfig, UserError
from minigpt4_jax.data.tokenizer import load_tokenizer
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests.tiny_tokenizer import write_model

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def model(**changes: Any) -> ModelConfig:
    """The tiny model with changes to its language model."""
    tiny = PRESETS["tiny"].model
    return dataclasses.replace(tiny, llama=dataclasses.replace(tiny.llama, **changes))


def hugging_face_arrays(llama: LlamaConfig, dtype: Any) -> dict[str, np.ndarray]:
    """Names and shapes from the format's side."""
    rng = np.random.default_rng(3)
    d, q, kv = llama.width, llama.num_heads * llama.head_dim, llama.num_kv_heads * llama.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (llama.vocab_size, d)}
    for i in range(llama.num_layers):
        name = f"model.layers.{i}"
        shapes |= {
            f"{name}.input_layernorm.weight": (d,),
            f"{name}.self_attn.q_proj.weight": (q, d),
            f"{name}.self_attn.k_proj.weight": (kv, d),
            f"{name}.self_attn.v_proj.weight": (kv, d),
            f"{name}.self_attn.o_proj.weight": (d, q),
            f"{name}.post_attention_layernorm.weight": (d,),
            f"{name}.mlp.gate_proj.weight": (llama.mlp_width, d),
            f"{name}.mlp.up_proj.weight": (llama.mlp_width, d),
            f"{name}.mlp.down_proj.weight": (d, llama.mlp_width),
        }
    shapes["model.norm.weight"] = (d,)
    if not llama.tie_embeddings:
        shapes["lm_head.weight"] = (llama.vocab_size, d)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def converted(config: ModelConfig, source: Any) -> ArraySource:
    """The tree of a Hugging Face source, as a source under its paths, with a part that is not the language model."""
    done = convert(
        source,
        hf_rules(config.llama),
        excuses=hf_excuses(config.llama),
        target=abstract_params(config)["llama"],
    )
    tree = {PART + path: value for path, value in flatten(done.params)}
    return ArraySource({**tree, "ln_vision/scale": np.ones(3, np.float32)})


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a converted LLaMA tokenizer of a few pieces."""
    from convert.tokenizer import convert_tokenizer

    write_model(tmp_path / "tokenizer.model")
    convert_tokenizer(tmp_path / "tokenizer.model", tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16", "bfloat16"])
def test_hugging_face_to_ours_and_back_is_the_same_bytes(
    dtype: Any, tied: bool, tokenizer: Path, tmp_path: Path
) -> None:
    config = model(tie_embeddings=tied, rope_base=500.0, norm_eps=3e-6)
    arrays = hugging_face_arrays(config.llama, dtype)
    save_file(arrays, tmp_path / "model.safetensors")
    ours = converted(config, SafetensorsSource(tmp_path / "model.safetensors"))
    result = export_llama(ours, tmp_path / "out", config=config, tokenizer=tokenizer)
    back = open_source(tmp_path / "out")
    assert set(back.names()) == set(arrays)
    assert back.metadata == {"format": "pt"}
    assert result.num_tensors == len(arrays)
    for name, x in arrays.items():
        found = back.get(name)
        assert (found.dtype, found.shape) == (x.dtype, x.shape), name
        assert np.ascontiguousarray(found).tobytes() == x.tobytes(), name
    assert hf_config(tmp_path / "out") == config.llama
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated["torch_dtype"] == result.dtype == np.dtype(dtype).name


def test_shards_hold_every_tensor_once_and_none_is_larger_than_asked(
    tokenizer: Path, tmp_path: Path
) -> None:
    config = model()
    arrays = hugging_face_arrays(config.llama, np.float32)
    ours = converted(config, ArraySource(arrays))
    largest = max(x.nbytes for x in arrays.values())
    seen: list[tuple[int, int, str]] = []
    result = export_llama(
        ours,
        tmp_path / "out",
        config=config,
        tokenizer=tokenizer,
        shard_bytes=largest,
        on_tensor=lambda *step: seen.append(step),
    )
    index = json.loads((tmp_path / "out" / SafetensorsSource.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    held: dict[str, list[str]] = {file: [] for file in result.files}
    for name, file in index["weight_map"].items():
        held[file].append(name)
    count = len(result.files)
    assert count > 2
    assert list(held) == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, names in held.items():
        assert 0 < sum(arrays[name].nbytes for name in names) <= largest
        assert (tmp_path / "out" / file).stat().st_size == result.files[file]["bytes"]
    back = open_source(tmp_path / "out")
    for name, x in arrays.items():
        assert np.array_equal(back.get(name), x), name
    assert [step[0] for step in seen] == list(range(1, len(arrays) + 1))
    assert {step[1] for step in seen} == {len(arrays)}
    assert {step[2] for step in seen} == set(arrays)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tokenizer: Path, tmp_path: Path) -> None:
    config = model()
    arrays = hugging_face_arrays(config.llama, np.float32)
    result = export_llama(
        converted(config, ArraySource(arrays)),
        tmp_path / "out",
        config=config,
        tokenizer=tokenizer,
        shard_bytes=1,
    )
    assert len(result.files) == len(arrays)


def test_tokenizer_files_come_along(tokenizer: Path, tmp_path: Path) -> None:
    config = model()
    ours = converted(config, ArraySource(hugging_face_arrays(config.llama, np.float32)))
    export_llama(ours, tmp_path / "out", config=config, tokenizer=tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer / name).read_bytes()
    words = load_tokenizer(tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stated == {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id}


def test_parameters_that_are_not_the_models_are_all_listed(tokenizer: Path, tmp_path: Path) -> None:
    config = model()
    ours = converted(config, ArraySource(hugging_face_arrays(config.llama, np.float32)))
    tree = {name: ours.get(name) for name in ours.names()}
    del tree["llama/norm/scale"]
    tree["llama/layers/0/mlp/up_proj/bias"] = np.zeros(3, np.float32)
    tree["llama/embed_tokens/embedding"] = np.zeros((3, 2), np.float32)
    tree["llama/layers/0/mlp/up_proj/kernel"] = tree["llama/layers/0/mlp/up_proj/kernel"].astype(
        np.int8
    )
    with pytest.raises(UserError) as raised:
        export_llama(ArraySource(tree), tmp_path / "out", config=config, tokenizer=tokenizer)
    text = str(raised.value)
    assert "missing: llama/norm/scale" in text
    assert "unexpected: llama/layers/0/mlp/up_proj/bias" in text
    assert "shape of llama/embed_tokens/embedding" in text
    assert "dtype of llama/layers/0/mlp/up_proj/kernel: is int8" in text
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tokenizer: Path, tmp_path: Path) -> None:
    config = model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_llama(ArraySource({}), tmp_path / "out", config=config, tokenizer=tokenizer)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    config = model(vocab_size=100)
    ours = converted(config, ArraySource(hugging_face_arrays(config.llama, np.float32)))
    with pytest.raises(UserError, match="the model 100 rows"):
        export_llama(ours, tmp_path / "out", config=config, tokenizer=tokenizer)


def test_room_is_checked_before_a_tensor_is_read(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    config = model()
    ours = converted(config, ArraySource(hugging_face_arrays(config.llama, np.float32)))
    size = sum(ours.get(n).nbytes for n in ours.names() if n.startswith(PART))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=size))

    def read(name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(ours, "get", read)
    with pytest.raises(UserError, match="GB free"):
        export_llama(ours, tmp_path / "out", config=config, tokenizer=tokenizer)
    assert not list(tmp_path.glob("*out*"))


def test_an_interrupted_export_leaves_nothing_and_the_next_one_succeeds(
    tokenizer: Path, tmp_path: Path
) -> None:
    config = model()
    ours = converted(config, ArraySource(hugging_face_arrays(config.llama, np.float32)))

    def stop(done: int, total: int, name: str) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_llama(ours, tmp_path / "out", config=config, tokenizer=tokenizer, on_tensor=stop)
    assert not list(tmp_path.glob("*out*"))
    left = tmp_path / ".out.partial"  # as a killed process leaves it
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_text("half")
    export_llama(ours, tmp_path / "out", config=config, tokenizer=tokenizer)
    assert not left.exists()
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_every_row_of_the_table_has_a_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model()
    names = [path for path, _, _ in export._names(config.llama)]
    assert sorted(names) == sorted(path for path, _ in flatten(abstract_params(config)["llama"]))
    rules = hf_rules(config.llama)
    odd = dataclasses.replace(rules[0], op=rules[0].op.then(rules[0].op))
    monkeypatch.setattr(export, "hf_rules", lambda config: (odd, *rules[1:]))
    with pytest.raises(NotImplementedError, match="embed_tokens"):
        list(export._names(config.llama))
