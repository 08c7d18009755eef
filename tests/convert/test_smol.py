"""The prepared smol folder is whole or absent, and a second call costs nothing.

Tiny files stand in for the real ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import model, smol
from convert.fetch import WheelMember
from minigpt4_jax.config import UserError
from minigpt4_jax.data.tokenizer import load_tokenizer
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS

Arrays = dict[str, np.ndarray]


@pytest.fixture
def files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gguf_arrays: Arrays,
    dino_arrays: Arrays,
    write_gguf: Callable[..., Path],
    write_onnx: Callable[..., Path],
) -> dict[str, Path]:
    """The tiny preset under the name smol, and its two files instead of a network."""
    found = {
        smol.LANGUAGE.project: write_gguf(tmp_path / "llm.gguf", gguf_arrays),
        smol.VISION.project: write_onnx(tmp_path / "vit.onnx", dino_arrays),
    }

    def fetched(wanted: WheelMember, cache: Path) -> Path:
        return found[wanted.project]

    monkeypatch.setenv("MINIGPT4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smol.fetch, "fetch_member", fetched)
    monkeypatch.setattr(smol, "get_preset", lambda name: PRESETS["tiny"])
    return found


def test_folder_holds_everything_but_the_projection(
    files: dict[str, Path], gguf_arrays: Arrays
) -> None:
    stages: list[tuple[str, int, int]] = []
    folder = smol.prepare_smol(lambda *stage: stages.append(stage))
    abstract = {
        k: v for k, v in abstract_params(PRESETS["tiny"].model).items() if k != "llama_proj"
    }
    params = ModelFolder(folder).load(abstract)
    np.testing.assert_array_equal(
        params["llama"]["embed_tokens"]["embedding"], gguf_arrays["token_embd.weight"]
    )
    assert load_tokenizer(folder).eos_id == 2
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sources"]["llama"]["member_sha256"] == smol.LANGUAGE.member_sha256
    assert manifest["sources"]["vit"]["licence"] == "MIT"
    assert {stage for stage, _, _ in stages} == {"Converting"}
    assert [done for _, done, _ in stages] == list(range(1, stages[0][2] + 1))


def test_second_call_returns_at_once(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = smol.prepare_smol()
    monkeypatch.setattr(smol, "write_model", None)
    monkeypatch.setattr(smol.fetch, "fetch_member", None)
    assert smol.prepare_smol() == folder


def test_new_version_of_the_tables_makes_another_folder(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = smol.smol_folder()
    monkeypatch.setattr(smol, "VERSION", smol.VERSION + 1)
    assert smol.smol_folder() != before


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_conversion_that_stops_halfway_leaves_nothing_that_loads_and_goes_on(
    error: type[BaseException], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = model.write_safetensors

    def stop(file: Path, entries: Any) -> Any:
        if file.name == "llama.safetensors":
            assert (file.parent / "vit.safetensors").is_file()
            raise error
        return write(file, entries)

    with monkeypatch.context() as patch:
        patch.setattr(model, "write_safetensors", stop)
        with pytest.raises(error):
            smol.prepare_smol()
    folder = smol.smol_folder()
    assert not folder.exists()
    assert (smol.prepare_smol() / "manifest.json").is_file()
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]


def test_folder_of_a_killed_run_is_cleared_away(files: dict[str, Path]) -> None:
    folder = smol.smol_folder()
    left = folder.with_name(f".{folder.name}.partial")
    (left / "weights").mkdir(parents=True)
    (left / "rubbish").touch()
    (left / "weights" / "llama.safetensors").write_bytes(b"half")
    smol.prepare_smol()
    assert not left.exists()
    assert not (folder / "rubbish").exists()
    ModelFolder(folder).require_whole()


def test_file_of_another_model_is_refused(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smol, "get_preset", lambda name: PRESETS["smol"])
    with pytest.raises(UserError, match="the smol preset expects LlamaConfig"):
        smol.prepare_smol()
    assert not smol.smol_folder().exists()


def test_pins_are_whole_hashes() -> None:
    for pin in (smol.LANGUAGE, smol.VISION):
        for digest in (pin.wheel_sha256, pin.member_sha256):
            assert len(bytes.fromhex(digest)) == hashlib.sha256().digest_size
