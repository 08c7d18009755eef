"""The set's models through the command that a person types: `python -m convert PRESET`, then the folder that it wrote.

With and without the Q-Former, from every form in which a set's weights come or can be written: safetensors or `.bin`
shards, Meta's files, a delta, the half-precision image tower. The folder's parameters are those that the tables give
(`conftest.py`), bit for bit; and what is loaded from it gives the original's image embeddings, logits and token ids.
That the tables themselves are right, the other golden tests show.

Sizes go to the command as `model.*`, read from the set's reports, as a person would give those of a model of their own.
Tolerances are those of the sets' README.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert import __main__ as command
from convert.eva_vit import eva_config
from convert.llama import hf_config
from convert.llama_files import open_llama
from convert.qformer import qformer_config
from convert.rules import flatten
from convert.sources import open_source
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.prompts import Piece, Special, encode_pieces
from minigpt4_jax.data.tokenizer import load_tokenizer
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import Batch, abstract_params, apply_method, forward, make_model
from tests import llama_forms as forms
from tests.parity.golden.golden_cases import BASE_LLAMA, BLIP2, QFORMER, V1, VIT, forward_cases
from tests.parity.golden.test_golden_llama_formats import arrays_of
from tests.parity.golden.test_golden_minigpt4 import ENCODED, LOGITS, ForwardCase
from tests.parity.golden.test_golden_text_tokenizer import CONTROL
from tests.published_files import sizes

PRESETS = {True: "vicuna-7b", False: "llama2-7b"}
"""By whether there is a Q-Former."""


def sizes_of(golden: Any, variant: str, vit: str = "eva_vit.pth") -> ModelConfig:
    """The model of a set, from its reports and the shapes in its files."""
    dims = golden.report(f"{VIT}/vit_report.json")["dims"]
    pixels = golden.pictures(f"{variant}/encode_img.npz").shape[1]
    source = open_source(golden.folder / VIT / vit)
    tower = eva_config(
        source,
        grid=pixels // source.shape("patch_embed.proj.weight")[-1],
        num_layers=dims["depth"],
        num_heads=dims["heads"],
    )
    rows = open_source(golden.folder / variant / "proj.pth").shape("llama_proj.weight")[1]
    qformer = None
    if variant == V1:
        heads = golden.report(f"{QFORMER}/qformer_report.json")["dims"]
        qformer = dataclasses.replace(
            qformer_config(open_source(golden.folder / BLIP2), num_heads=heads["heads"]),
            norm_eps=heads["layer_norm_eps"],
        )
    return ModelConfig(
        vit=dataclasses.replace(tower, norm_eps=dims["norm_eps"]),
        qformer=qformer,
        llama=hf_config(golden.folder / BASE_LLAMA),
        ln_vision_eps=dims["ln_vision_eps"],
        patches_per_token=None if qformer else rows // tower.width,
    )


def convert(golden: Any, variant: str, out: Path, **given: Any) -> ModelFolder:
    """Runs the command on the set's files, or on those that are given instead."""
    files: dict[str, Any] = {
        "vit": golden.folder / VIT / "eva_vit.pth",
        "llm": golden.folder / BASE_LLAMA,
        "projection": golden.folder / variant / "proj.pth",
        "tokenizer": golden.folder / golden.report("text/tokenizer_cases.json")["tokenizer"],
    }
    if variant == V1:
        files["qformer"] = golden.folder / BLIP2
    files |= given
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    model = sizes_of(golden, variant, Path(files["vit"]).name)
    assert command.main([PRESETS[variant == V1], *options, "--out", str(out), *sizes(model)]) == 0
    assert command.main(["verify", str(out)]) == 0
    return ModelFolder(out)


def require_tree(folder: ModelFolder, expected: dict[str, Any]) -> None:
    """The folder holds exactly these parameters, bit for bit."""
    flat = {name: np.asarray(x) for name, x in flatten(expected)}
    assert set(folder.names()) == set(flat)
    for name, value in flat.items():
        assert folder.dtype(name) == value.dtype, name
        assert folder.get(name).tobytes() == value.tobytes(), name


Converted = Callable[[str], ModelFolder]


@pytest.fixture(scope="module")
def converted(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The model folder of a composition, made once for all tests here."""

    @functools.cache
    def make(variant: str) -> ModelFolder:
        return convert(golden, variant, tmp_path_factory.mktemp(variant) / "model")

    return make


def load(folder: ModelFolder) -> dict[str, Any]:
    params: dict[str, Any] = folder.load(abstract_params(folder.preset.model), dtype=jnp.float32)
    return params


def test_golden_command_writes_what_the_tables_give(
    golden: Any, converted: Converted, composition: str
) -> None:
    folder = converted(composition)
    pixels = golden.pictures(f"{composition}/encode_img.npz").shape[1]
    config, params = golden.minigpt4(pixels, variant=composition)
    assert folder.preset.model == config
    require_tree(folder, params)


def test_golden_command_makes_a_model_that_sees_what_the_original_sees(
    golden: Any, converted: Converted, composition: str
) -> None:
    folder = converted(composition)
    held = golden.arrays(f"{composition}/encode_img.npz")
    images = golden.pictures(f"{composition}/encode_img.npz")
    model = make_model(folder.preset.model, layout=DISK, dtype=jnp.float32)
    embeds = apply_method(model, load(folder), "encode_images", images)
    np.testing.assert_allclose(embeds, held["inputs_llama"], **ENCODED)


def test_golden_command_makes_a_model_with_the_logits_of_the_original(
    golden: Any, converted: Converted, composition: str
) -> None:
    folder = converted(composition)
    runs = (
        ForwardCase(golden, composition, case)
        for name, case in forward_cases(golden)
        if name == composition and "logits" in golden.keys(f"{name}/{case}.npz")
    )
    run = next(run for run in runs if run.config == folder.preset.model)
    model = make_model(folder.preset.model, layout=DISK, dtype=jnp.float32)
    batch = Batch(
        token_ids=jnp.asarray(run.batch["token_ids"]),
        attention_mask=jnp.asarray(run.batch["attention_mask"]),
        images=run.images,
    )
    logits = forward(load(folder), batch, model=model).logits
    for row, counts in enumerate(run.counts):
        theirs = run.held["logits"][row][counts]
        np.testing.assert_allclose(logits[row, : counts.sum()], theirs, **LOGITS)


def test_golden_command_makes_a_tokenizer_with_the_ids_of_the_original(
    golden: Any, converted: Converted, composition: str, tokenizer_file: str
) -> None:
    folder = converted(composition)
    tokenizer, record = load_tokenizer(folder.path), golden.report(f"text/{tokenizer_file}")
    assert record["encode"]
    for case in record["encode"]:
        pieces: list[Piece] = [
            Special(part) if CONTROL.fullmatch(part) else part
            for part in CONTROL.split(case["text"])
        ]
        ids = encode_pieces(pieces, tokenizer, num_image_tokens=1)
        assert ids == case["ids_without_bos"], case["text"]


def test_golden_command_takes_bin_shards(
    golden: Any, converted: Converted, composition_with_bin: str, tmp_path: Path
) -> None:
    expected = converted(composition_with_bin)
    llm = tmp_path / "llm"
    llm.mkdir()
    shards = list((golden.folder / BASE_LLAMA).glob("pytorch_model*"))
    assert shards
    for file in (golden.folder / BASE_LLAMA / "config.json", *shards):
        (llm / file.name).symlink_to(file)
    found = convert(golden, composition_with_bin, tmp_path / "model", llm=llm)
    assert all(file["name"].endswith(".bin") for file in found.sources["llama"]["files"])
    require_tree(found, tree_of(expected))


def test_golden_command_takes_the_half_precision_tower(
    golden: Any, converted: Converted, composition: str, other_vit_file: str, tmp_path: Path
) -> None:
    expected = converted(composition)
    file = golden.folder / VIT / other_vit_file
    found = convert(golden, composition, tmp_path / "model", vit=file)
    params = tree_of(expected)
    _, conversion = golden.vit(other_vit_file, found.preset.model.vit.image_size)
    require_tree(found, params | {"vit": conversion.params})
    halves = [name for name in found.names() if found.dtype(name) == np.float16]
    assert halves
    assert {name.split("/")[0] for name in halves} == {"vit"}


def test_golden_command_takes_files_of_meta(
    golden: Any, converted: Converted, composition: str, tmp_path: Path
) -> None:
    expected = converted(composition)
    opened = open_llama(golden.folder / BASE_LLAMA)
    config = opened.config
    params = forms.params_json(
        config,
        multiple_of=config.mlp_width,  # any width by Meta's formula: half of it, rounded up
        ffn_dim_multiplier=config.mlp_width / 2 / int(8 * config.width / 3),
        rope_theta=config.rope_base,
        max_seq_len=config.max_positions,
    )
    theirs = forms.to_meta(arrays_of(opened), heads=config.num_heads, kv_heads=config.num_kv_heads)
    llm = forms.write_meta(tmp_path / "meta", theirs, params=params, shards=1)
    require_tree(convert(golden, composition, tmp_path / "model", llm=llm), tree_of(expected))


def test_golden_command_adds_a_delta(
    golden: Any, converted: Converted, composition_on_vicuna: str, tmp_path: Path
) -> None:
    """The base has the upper bits of every number, the delta the rest, and the last row of the vocabulary alone."""
    expected = converted(composition_on_vicuna)
    config = golden.report(f"{BASE_LLAMA}/config.json")
    merged = arrays_of(open_llama(golden.folder / BASE_LLAMA))
    base = {
        name: (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        for name, x in merged.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in base:
            base[name] = base[name][:-1]
    llm = forms.write_hugging_face(
        tmp_path / "base", base, config=config | {"vocab_size": config["vocab_size"] - 1}
    )
    delta = forms.write_hugging_face(
        tmp_path / "delta", forms.as_delta(merged, base), config=config, kind="bin"
    )
    found = convert(golden, composition_on_vicuna, tmp_path / "model", llm=llm, delta=delta)
    require_tree(found, tree_of(expected))


def tree_of(folder: ModelFolder) -> dict[str, Any]:
    return {name: folder.get(name) for name in folder.names()}
