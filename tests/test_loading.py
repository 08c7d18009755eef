"""From a model's name to its parameters: as the engine reads them, with one layer of memory beside them."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax import UserError, checksums, loading
from minigpt4_jax.checkpoint import compare_trees
from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.loading import load_decode_params, load_frozen, pick_dtype
from minigpt4_jax.models.kv_cache import init_cache
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.sharding import make_mesh, make_shardings
from tests.tiny_folder import write_folder

TINY = PRESETS["tiny-qformer"]
DEEP = dataclasses.replace(
    TINY,
    model=dataclasses.replace(
        TINY.model, llama=dataclasses.replace(TINY.model.llama, num_layers=11, num_kv_heads=4)
    ),
)
"""More layers than digits, and kv heads for four devices."""
LAYER = 634_408_960
"""Bytes of a layer of the 13B in bfloat16: what loading holds beside the result."""
LAYOUTS = {"decode": DECODE, "int8": DECODE_INT8}


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


def converted(params: Any, layout: Any) -> Any:
    """The whole model at once. Compiled, as loading does it: a value between two int8 may go either way otherwise."""
    return jax.jit(lambda tree: convert_layout(tree, DISK, layout, llama=DEEP.model.llama))(params)


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def must_not_read(*_: Any, **__: Any) -> Any:
    raise AssertionError("read")


def test_auto_is_float32_where_bfloat16_would_be_emulated() -> None:
    assert pick_dtype("float32") == pick_dtype("auto") == jnp.float32
    assert pick_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_parameters_come_as_the_whole_model_would_be_converted(
    folder: str, params: Any, layout: Any
) -> None:
    read, tokenizer = load_decode_params(folder, dtype=jnp.bfloat16, layout=layout)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_same(read, converted(cast, layout))
    assert tokenizer.vocab_size == byte_tokenizer().vocab_size


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_on_a_mesh_every_device_gets_its_part(folder: str, params: Any, layout: Any) -> None:
    mesh, cut = (
        make_mesh(tensor=4, devices=jax.devices()[:4]),
        dataclasses.replace(layout, shards=4),
    )
    read, _ = load_decode_params(folder, dtype=jnp.float32, layout=cut, mesh=mesh)
    assert_same(read, converted(params, cut))
    places = jax.tree.leaves(make_shardings(mesh, read))
    for leaf, place in zip(jax.tree.leaves(read), places, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    kernel = read["llama"]["layers"]["10"]["mlp"]["gate_up_proj"]["kernel"]
    assert [s.data.shape for s in kernel.addressable_shards] == [(32, 2 * 64 // 4)] * 4


def test_the_first_process_alone_reads_everything_before_its_part(
    folder: str, params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "file_checksum", must_not_read)
    with pytest.raises(AssertionError, match="read"):
        load_frozen(folder)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    load_frozen(folder)


def test_a_layout_or_a_model_that_does_not_fit_the_mesh_is_refused_before_anything_is_read(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt4_jax.model_folder.WeightFile.read", must_not_read)
    mesh = make_mesh(tensor=4, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match=r"layout.shards is 1; expected 4"):
        load_decode_params(folder, dtype=jnp.float32, layout=DECODE, mesh=mesh)
    with pytest.raises(UserError, match="tensor=3 and the language model 4 kv heads"):
        load_decode_params(
            folder,
            dtype=jnp.float32,
            layout=dataclasses.replace(DECODE, shards=3),
            mesh=make_mesh(tensor=3, devices=jax.devices()[:3]),
        )


def test_a_model_in_a_bucket_comes_with_its_tokenizer(folder: str, params: Any) -> None:
    bucket = fsspec.filesystem("memory")
    for file in Path(folder).rglob("*"):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            bucket.pipe_file(f"/models/deep/{name}", file.read_bytes())
    read, tokenizer = load_decode_params("memory://models/deep", dtype=jnp.float32, layout=DECODE)
    assert_same(read, converted(params, DECODE))
    assert tokenizer.encode("A cup.") == byte_tokenizer().encode("A cup.")


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
    here = get_ident()

    def listen(event: str, _: float, **__: Any) -> None:
        # An engine of an earlier test may still compile in a thread of its own.
        if event == "/jax/core/compile/backend_compile_duration" and get_ident() == here:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        load_decode_params(folder, dtype=jnp.float32, layout=DECODE)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1


def test_a_folder_of_another_model_is_refused_before_anything_is_read(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loading, "_frozen", lambda _: {"llama": abstract_params(TINY.model)["llama"]}
    )
    monkeypatch.setattr("minigpt4_jax.model_folder.WeightFile.read", must_not_read)
    projection = {"kernel": np.zeros(1), "bias": np.zeros(1)}
    monkeypatch.setattr(loading, "load_projection", lambda *_, **__: projection)
    with pytest.raises(UserError, match="unexpected: llama/layers/10/"):
        load_decode_params(folder, dtype=jnp.float32, layout=DECODE)


def decode_bytes(name: str, *, layout: Any, cache: Any) -> dict[str, int]:
    """What lies on the device, from shapes alone: all parts but the language model in bfloat16, one row of 2,048."""
    config = PRESETS[name].model
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract_params(config)
    )
    tree = jax.eval_shape(lambda t: convert_layout(t, DISK, layout, llama=config.llama), abstract)
    caches = jax.eval_shape(
        lambda: jax.tree.leaves(init_cache(config.llama, 1, capacity=2048, dtype=cache))
    )
    language = num_bytes(tree.pop("llama"))
    return {"language": language, "vision": num_bytes(tree), "cache": num_bytes(caches)}


def test_13b_in_int8_fits_a_card_of_24_gb() -> None:
    """With room for what a step and a picture need beside it; in bfloat16 the weights alone are more."""
    float_cache = decode_bytes("vicuna-13b", layout=DECODE_INT8, cache=jnp.bfloat16)
    assert float_cache == {
        "language": 13_188_782_084,
        "vision": 2_189_993_728,
        "cache": 1_677_721_600,
    }
    int8_cache = decode_bytes("vicuna-13b", layout=DECODE_INT8, cache=jnp.int8)
    assert int8_cache == {**float_cache, "cache": 865_075_200}
    assert sum(float_cache.values()) < 24e9 - LAYER - 4e9
    assert sum(decode_bytes("vicuna-13b", layout=DECODE, cache=jnp.int8).values()) > 24e9


def test_while_it_is_loaded_13b_in_int8_needs_a_layer_more() -> None:
    layer = abstract_params(PRESETS["vicuna-13b"].model)["llama"]["layers"]["0"]
    assert sum(leaf.size for leaf in jax.tree.leaves(layer)) * 2 == LAYER
