"""From a model's name to its parameters: as the engine reads them, with one layer of memory beside them."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import UserError, loading
from minigpt4_jax.checkpoint import compare_trees
from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.loading import load_decode_params, pick_dtype
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from tests.tiny_folder import write_folder

TINY = PRESETS["tiny-qformer"]
DEEP = dataclasses.replace(
    TINY,
    model=dataclasses.replace(
        TINY.model, llama=dataclasses.replace(TINY.model.llama, num_layers=11, num_kv_heads=4)
    ),
)
"""More layers than digits, and kv heads for four devices."""
LAYOUTS = {"decode": DECODE}


@pytest.fixture(scope="module")
def params(draw_params: Callable[[Any], Any]) -> Any:
    """NumPy, in the layout `DISK`."""
    return jax.tree.map(np.asarray, draw_params(abstract_params(DEEP.model)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, params: Any) -> str:
    path = write_folder(tmp_path_factory.mktemp("loading") / "model", params, preset=DEEP)
    byte_tokenizer()._backend.save(str(path / "tokenizer.json"))
    write_checksums(path)
    return str(path)


def assert_same(actual: Any, expected: Any) -> None:
    assert compare_trees(actual, expected) == []
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_auto_is_float32_where_bfloat16_would_be_emulated() -> None:
    assert pick_dtype("float32") == pick_dtype("auto") == jnp.float32
    assert pick_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_come_as_the_whole_model_would_be_converted(
    folder: str, params: Any, layout: Any, dtype: Any
) -> None:
    read, tokenizer = load_decode_params(folder, dtype=dtype, layout=layout)
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    assert_same(read, convert_layout(cast, DISK, layout, llama=DEEP.model.llama))
    assert tokenizer.vocab_size == byte_tokenizer().vocab_size


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_more_than_one_layer_lies_beside_the_result(
    folder: str, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled whenever a layer was converted and what it was made from is still there."""
    make, made, samples = loading._by_layer, [0], []

    def by_layer(*args: Any) -> Callable[[Any], Any]:
        transform = make(*args)

        def sampled(part: Any) -> Any:
            result = transform(part)
            live = sum(leaf.nbytes for leaf in jax.live_arrays()) - before
            made[0] += num_bytes(result)
            samples.append((live, made[0], num_bytes(part)))
            return result

        return sampled

    monkeypatch.setattr(loading, "_by_layer", by_layer)
    gc.collect()
    before = sum(leaf.nbytes for leaf in jax.live_arrays())
    read, _ = load_decode_params(folder, dtype=jnp.float32, layout=layout)
    assert made[0] == num_bytes(read) - num_bytes(read["llama_proj"])
    assert len(samples) > DEEP.model.llama.num_layers + DEEP.model.vit.num_layers
    for live, so_far, part in samples:
        assert live <= so_far + part


def test_the_conversion_is_compiled_once_for_all_layers(folder: str) -> None:
    load_decode_params(folder, dtype=jnp.float32, layout=DECODE)
    jax.clear_caches()
    compiled: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    load_decode_params(folder, dtype=jnp.float32, layout=DECODE)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1


def test_a_folder_of_another_model_is_refused_before_anything_is_read(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_read(*_: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(
        loading, "_frozen", lambda _: {"llama": abstract_params(TINY.model)["llama"]}
    )
    monkeypatch.setattr("minigpt4_jax.model_folder.WeightFile.read", must_not_read)
    projection = {"kernel": np.zeros(1), "bias": np.zeros(1)}
    monkeypatch.setattr(loading, "load_projection", lambda *_, **__: projection)
    with pytest.raises(UserError, match="unexpected: llama/layers/10/"):
        load_decode_params(folder, dtype=jnp.float32, layout=DECODE)
