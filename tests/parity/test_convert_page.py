"""docs/convert.md: every command on it is run as it stands there, in its order, on tiny files of the real names.

The presets have the sizes of those files here; everything else is what a person gets. Needs the `parity` extra.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert import __main__ as convert_cli
from convert.pth import write_pth
from minigpt4_jax import cli
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests.published_files import (
    LLAMA,
    MODEL,
    WITHOUT_QFORMER,
    eva_arrays,
    llama_arrays,
    projection_arrays,
    qformer_arrays,
    with_tokenizer,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "convert.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page names, and presets of their sizes."""
    monkeypatch.chdir(tmp_path)
    for name, model, file in (
        ("vicuna-7b", MODEL, "prerained_minigpt4_7b.pth"),
        ("llama2-7b", WITHOUT_QFORMER, "pretrained_minigpt4_llama2_7b.pth"),
    ):
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(PRESETS[name], model=model))
        write_pth(Path(file), {"model": projection_arrays(model)})
    assert MODEL.qformer is not None
    write_pth(Path("eva_vit_g.pth"), eva_arrays(MODEL.vit))
    write_pth(
        Path("blip2_pretrained_flant5xxl.pth"), {"model": qformer_arrays(MODEL.qformer, MODEL.vit)}
    )
    merged, config = llama_arrays(), forms.hf_json(LLAMA)
    halves = {n: x for n, x in merged.items() if not n.endswith("inv_freq")}
    rng = np.random.default_rng(0)
    base = {n: x + rng.normal(size=x.shape).astype(x.dtype) / 100 for n, x in halves.items()}
    for folder, arrays in (
        ("vicuna-7b-v0", merged),
        ("Llama-2-7b-chat-hf", merged),
        ("llama-7b", base),
        ("vicuna-7b-delta-v0", forms.as_delta(halves, base)),
    ):
        with_tokenizer(forms.write_hugging_face(Path(folder), arrays, config=config))
    (yaml,) = [text for kind, text in BLOCKS if kind == "yaml"]
    Path("vicuna.yaml").write_text(yaml)
    Path("examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(line: str) -> int:
    program, *arguments = shlex.split(line)
    if program == "minigpt4":
        return cli.main(arguments)
    assert (program, *arguments[:2]) == ("python", "-m", "convert")
    return convert_cli.main(arguments[2:])


def test_every_command_of_the_page_runs_as_it_stands(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) == 10
    for line in COMMANDS:
        assert run(line) == 0, (line, capsys.readouterr().err)
    folders = {
        n: ModelFolder(f"models/{n}") for n in ("vicuna-7b", "vicuna-7b-from-delta", "from-yaml")
    }
    assert folders["vicuna-7b"].settings["llm"] == str(published / "vicuna-7b-v0")
    for name in folders["vicuna-7b"].names():
        value = folders["from-yaml"].get(name)
        assert value.tobytes() == folders["vicuna-7b-from-delta"].get(name).tobytes()
        np.testing.assert_allclose(value, folders["vicuna-7b"].get(name), rtol=0, atol=1e-6)
    theirs: Any = torch.load("prerained_minigpt4_7b.pth", weights_only=True)["model"]
    ours = torch.load("mine.pth", weights_only=True)["model"]
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_the_readme_shows_the_command_of_the_page() -> None:
    readme = (ROOT / "README.md").read_text()
    (section,) = re.findall(r"## Bring the published weights\n(.*?)\n## ", readme, re.DOTALL)
    (block,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    assert block.splitlines()
    assert set(block.splitlines()) <= set(COMMANDS)
    assert "docs/convert.md" in section
