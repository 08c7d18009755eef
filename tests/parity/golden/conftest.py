"""The golden set: where it lies, which cases it holds, and its weights as this project's parameters.

A golden set is a folder of numbers that the original PyTorch code produced with tiny random weights. The tests here
compare this project with it: `test_golden_vit.py` the image tower, `test_golden_llama.py` the language model,
`test_golden_qformer.py` the Q-Former, `test_golden_llama_formats.py` the language model's other forms and what every
weight file is, `test_golden_generation.py` greedy answers and beams, `test_golden_minigpt4.py` the compositions with
and without the Q-Former, `test_golden_command.py` the same through `python -m convert`, `test_golden_chat.py`
conversations with them, `test_golden_images.py` picture files and what the image processors make of them,
`test_golden_optim.py` schedules, weight decay and training runs, `test_golden_text.py` and
`test_golden_text_tokenizer.py` what happens to text on its way in and out, `test_golden_true_tokenizer.py` the same
with LLaMA's real vocabulary.

    pytest tests/parity -k golden                                  the set in tests/golden
    MINIGPT4_GOLDEN=/other/set pytest tests/parity -k golden       another set with the same layout

Nothing about a set is written down here but the layout of its files: sizes, eps, cases, texts and special ids are read
from its reports and arrays. A case that a set does not hold is not collected; a folder that holds none is a failure.
Needs the `parity` extra (sentencepiece), not torch. Not for: the original's code (it is not here; sets are made
elsewhere) and MiniGPT-v2's training on texts and conversations (it comes with its features).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.eva_vit import eva_config, eva_excuses, eva_rules, plain_ln_vision
from convert.llama import hf_config, hf_excuses, hf_rules
from convert.projection import read_projection
from convert.qformer import PARTS, naming_of, qformer_config, qformer_excuses, qformer_rules
from convert.rules import Conversion, convert
from convert.sources import open_source
from convert.tokenizer import convert_tokenizer
from minigpt4_jax.config import ModelConfig, VitConfig
from minigpt4_jax.data.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.models.minigpt4 import Params, abstract_params
from minigpt4_jax.presets import PRESETS
from tests.parity.golden.golden_cases import BASE_LLAMA, BLIP2, CASES, NOQF, QFORMER, V1, V2, VIT

DEFAULT = Path(__file__).parents[2] / "golden"
FOLDER = Path(os.environ.get("MINIGPT4_GOLDEN") or DEFAULT).absolute()

LORA_A = re.compile(r"\.layers\.(\d+)\.self_attn\.(\w+)\.lora_A\.")


class GoldenSet:
    """Reads a set. Weights go through the converter's own tables, so these are under test as well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """All arrays of an `.npz` file."""
        with np.load(self.folder / name) as file:
            return dict(file)

    def pictures(self, name: str) -> jax.Array:
        """The pictures of an `.npz` file, from the original's [..., C, H, W] to [..., H, W, C]."""
        with np.load(self.folder / name) as file:
            return jnp.asarray(np.moveaxis(file["image"], -3, -1))

    def keys(self, name: str) -> list[str]:
        """Names of the arrays of an `.npz` file, in its order."""
        with np.load(self.folder / name) as file:
            return list(file.files)

    def report(self, name: str) -> dict[str, Any]:
        """A JSON file."""
        report: dict[str, Any] = json.loads((self.folder / name).read_text())
        return report

    def vit(self, checkpoint: str, image_size: int) -> tuple[VitConfig, Conversion]:
        """The image tower for pictures of `image_size` pixels, weights in the dtype of the file."""
        source = open_source(self.folder / VIT / checkpoint)
        dims = self.report(f"{VIT}/vit_report.json")["dims"]
        config = eva_config(
            source,
            grid=image_size // source.shape("patch_embed.proj.weight")[-1],
            num_layers=dims["depth"],
            num_heads=dims["heads"],
        )
        config = dataclasses.replace(config, norm_eps=dims["norm_eps"])
        conversion = convert(
            source,
            eva_rules(config),
            excuses=eva_excuses(config),
            target=abstract_params(self.vit_model(config))["vit"],
        )
        return config, conversion

    def vit_model(self, config: VitConfig) -> ModelConfig:
        """A model around the image tower whose other parts do not matter; one patch per token fits every grid."""
        eps = self.report(f"{VIT}/vit_report.json")["dims"]["ln_vision_eps"]
        return dataclasses.replace(
            PRESETS["tiny"].model, vit=config, ln_vision_eps=eps, patches_per_token=1
        )

    def qformer(self) -> tuple[ModelConfig, Conversion]:
        """The Q-Former, its queries and `ln_vision`: a model whose image tower only has the right width, and trees."""
        source = open_source(self.folder / BLIP2)
        dims = self.report(f"{QFORMER}/qformer_report.json")["dims"]
        config = qformer_config(source, num_heads=dims["heads"])
        config = dataclasses.replace(config, norm_eps=dims["layer_norm_eps"])
        tiny = PRESETS["tiny"].model
        vit = dataclasses.replace(tiny.vit, width=source.shape("ln_vision.weight")[0], num_heads=1)
        model = dataclasses.replace(tiny, vit=vit, qformer=config, patches_per_token=None)
        abstract, naming = abstract_params(model), naming_of(source)
        conversion = convert(
            source,
            qformer_rules(config, naming),
            excuses=qformer_excuses(naming),
            target={part: abstract[part] for part in PARTS},
        )
        return model, conversion

    def llama(self, name: str) -> tuple[ModelConfig, Params]:
        """A Hugging Face folder: a model whose image tower does not matter, and its `llama` tree in a full one."""
        folder = self.folder / name
        config = hf_config(folder)
        model = dataclasses.replace(PRESETS["tiny"].model, llama=config)
        conversion = convert(
            open_source(folder),
            hf_rules(config),
            excuses=hf_excuses(config),
            target=abstract_params(model)["llama"],
        )
        return model, {"llama": conversion.params}

    def tokenizer(self, name: str) -> Tokenizer:
        """The sentencepiece model of a Hugging Face folder as `python -m convert` makes it: this project's own."""
        with tempfile.TemporaryDirectory() as out:
            convert_tokenizer(self.folder / name, Path(out))
            return load_tokenizer(out)

    def special_ids(self, name: str) -> dict[str, int]:
        """`bos`, `eos` and `pad` as the Hugging Face folder says."""
        config = self.report(f"{name}/config.json")
        return {which: config[f"{which}_token_id"] for which in ("bos", "eos", "pad")}

    def minigpt4(self, image_size: int, *, variant: str) -> tuple[ModelConfig, Params]:
        """A composition for pictures of `image_size` pixels: config and full tree.

        `variant` is a folder: `minigpt4_v1` behind the Q-Former, `minigpt4_noqf` without it; `minigptv2` is the latter
        with other numbers once its LoRA is added to the language model's weights.
        """
        vit, conversion = self.vit("eva_vit.pth", image_size)
        language, params = self.llama(BASE_LLAMA)
        file = {V1: "proj.pth", NOQF: "proj.pth", V2: "minigptv2_ckpt.pth"}[variant]
        checkpoint = self.folder / variant / file
        full = {**params, "vit": conversion.params}
        if variant == V1:
            model, queries = self.qformer()
            config = dataclasses.replace(
                self.vit_model(vit),
                llama=language.llama,
                qformer=model.qformer,
                patches_per_token=None,
            )
            full |= {**queries.params, "llama_proj": read_projection(checkpoint, config)[0]}
            return config, full
        trained = {
            name: open_source(checkpoint).get(name) for name in open_source(checkpoint).names()
        }
        rows = trained["llama_proj.weight"].shape[1]
        config = dataclasses.replace(
            self.vit_model(vit), llama=language.llama, patches_per_token=rows // vit.width
        )
        full["ln_vision"] = self.ln_vision(vit, variant=variant)
        if variant == V2:
            return config, self.with_trained(full, trained)
        return config, {**full, "llama_proj": read_projection(checkpoint, config)[0]}

    def with_trained(self, params: Params, trained: dict[str, Any]) -> Params:
        """`params` with what MiniGPT-v2 trains, by its names in the original: the projection, and the kernels of the
        language model plus `scaling * B @ A` of their LoRA. Differentiable in `trained`."""
        scaling = self.report(f"{V2}/cases.json")["lora"]["scaling"]
        layers = {i: dict(layer) for i, layer in params["llama"]["layers"].items()}
        for name, half in trained.items():
            found = LORA_A.search(name)
            if found is None:
                continue
            layer, kernel = found.groups()
            other = trained[name.replace("lora_A", "lora_B")]
            attention = dict(layers[layer]["self_attn"])
            base = attention[kernel]["kernel"]
            attention[kernel] = {"kernel": base + scaling * (other @ half).T}
            layers[layer]["self_attn"] = attention
        projection = {"kernel": trained["llama_proj.weight"].T, "bias": trained["llama_proj.bias"]}
        return {**params, "llama": {**params["llama"], "layers": layers}, "llama_proj": projection}

    def ln_vision(self, vit: VitConfig, *, variant: str) -> dict[str, np.ndarray]:
        """Without the Q-Former nothing loads `ln_vision`: weight 1, bias 0, unless the set names others in force."""
        file, plain = f"{variant}/encode_img.npz", plain_ln_vision(vit)
        held = self.arrays(file) if self.has(file) else {}
        return {
            "scale": held.get("ln_vision_weight", plain["scale"]),
            "bias": held.get("ln_vision_bias", plain["bias"]),
        }

    def blip2_ln_vision(self) -> dict[str, np.ndarray]:
        """`ln_vision` of the Q-Former's file, also of a set that has no more of the Q-Former than this."""
        source = open_source(self.folder / BLIP2)
        return {"scale": source.get("ln_vision.weight"), "bias": source.get("ln_vision.bias")}


GOLDEN = GoldenSet(FOLDER)


@pytest.fixture(scope="session")
def golden() -> GoldenSet:
    """The set under test."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_cases() -> dict[str, list[Any]]:
    """What the set holds, by the parameter name that tests ask for it with."""
    return {name: discover(GOLDEN) for name, discover in CASES.items()}


NOT_HELD = object()
"""Stands for a kind of case that the set does not hold; its tests are taken out of the collection again."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in (
        name for name in CASES if name in metafunc.fixturenames
    ):  # in one order, for xdist
        metafunc.parametrize(name, CASES[name](GOLDEN) or [NOT_HELD], ids=case_id, scope="session")


def case_id(case: Any) -> str:
    return "-".join(map(str, case)) if isinstance(case, tuple) else str(case)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gone = [
        item
        for item in items
        if NOT_HELD in getattr(getattr(item, "callspec", None), "params", {}).values()
    ]
    items[:] = [item for item in items if item not in gone]
    config.hook.pytest_deselected(items=gone)
