"""The golden set's models, converted by the command a person types, compute what `transformers` does at every stage.

For: `verify --against-torch` on weights that are not this project's own. Needs torch and transformers (the `parity`
extra). Not for: the original's own numbers, which the other files of this folder hold the models to.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from convert import __main__ as cli
from convert.against_torch import NEW_TOKENS, compare_with_torch
from convert.settings import ConvertConfig
from minigpt4_jax.config_file import to_yaml
from minigpt4_jax.model_folder import ModelFolder
from tests.parity.golden.golden_cases import BASE_LLAMA, BLIP2, NOQF, V1, VIT

PRESETS = {V1: "vicuna-7b", NOQF: "llama2-7b"}


def test_golden_models_agree_with_transformers(
    golden: Any, composed_case: tuple[str, str, str], tmp_path: Path
) -> None:
    variant, pictures, tower = composed_case
    image_size = golden.pictures(f"{variant}/{pictures}").shape[-2]
    config, _ = golden.minigpt4(image_size, variant=variant)
    files = {
        "vit": f"{VIT}/{tower}",
        "llm": BASE_LLAMA,
        "projection": f"{variant}/proj.pth",
        **({"qformer": BLIP2} if variant == V1 else {}),
    }
    settings = ConvertConfig(
        model=dataclasses.asdict(config),
        **{part: str(golden.folder / name) for part, name in files.items()},
    )
    (tmp_path / "settings.yaml").write_text(to_yaml(settings))
    command = [PRESETS[variant], "--config", str(tmp_path / "settings.yaml")]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    folder = ModelFolder(tmp_path / "out")
    found = compare_with_torch(folder, *ConvertConfig.of_folder(folder))
    print(variant, {name: f"{value:.1e}" for name, value in found.stages.items()})
    assert found.broken == []
    assert found.agreeing == NEW_TOKENS
