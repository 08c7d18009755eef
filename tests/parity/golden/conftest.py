"""The golden set: where it lies, which cases it holds, and its weights as this project's parameters.

A golden set is a folder of numbers that the original PyTorch code produced with tiny random weights. The tests here
compare this project with it: `test_golden_vit.py` the image tower, `test_golden_llama.py` the language model,
`test_golden_llama_formats.py` its other forms and what every weight file is, `test_golden_generation.py` greedy
answers, `test_golden_minigpt4.py` the composition without a Q-Former, `test_golden_chat.py` conversations with it,
`test_golden_images.py` picture files and what the image processors make of them, `test_golden_optim.py` schedules,
weight decay and training runs, `test_golden_text.py` and `test_golden_text_tokenizer.py` what happens to text on its
way in and out, `test_golden_true_tokenizer.py` the same with LLaMA's real vocabulary.

    pytest tests/parity -k golden                                  the set in tests/golden
    MINIGPT4_GOLDEN=/other/set pytest tests/parity -k golden       another set with the same layout

Nothing about a set is written down here but the layout of its files: sizes, eps, cases, texts and special ids are read
from its reports and arrays. A case that a set does not hold is not collected; a folder that holds none is a failure.
Needs the `parity` extra (sentencepiece), not torch. Not for: the original's code (it is not here; sets are made
elsewhere) and beams, the Q-Former, MiniGPT-v2's chat (they come with their features).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.eva_vit import eva_config, eva_excuses, eva_rules
from convert.llama import hf_config, hf_excuses, hf_rules
from convert.projection import read_projection
from convert.rules import Conversion, convert
from convert.sources import open_source
from convert.tokenizer import convert_tokenizer
from minigpt4_jax.config import ModelConfig, VitConfig
from minigpt4_jax.data.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.models.minigpt4 import Params, abstract_params
from minigpt4_jax.presets import PRESETS

DEFAULT = Path(__file__).parents[2] / "golden"
FOLDER = Path(os.environ.get("MINIGPT4_GOLDEN") or DEFAULT).absolute()

VIT, NOQF, V2, OPTIM, IMAGES = "eva_vit", "minigpt4_noqf", "minigptv2", "optim", "images"
BASE_LLAMA = "llama_mha"
"""The language model behind `minigpt4_noqf`, as the README of the sets says."""
BLIP2 = "qformer/blip2_qformer.pth"
LORA_A = re.compile(r"\.layers\.(\d+)\.self_attn\.(\w+)\.lora_A\.")
PLACEHOLDER = "<ImageHere>"


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
        """The pictures of an `.npz` file, from the original's NCHW to NHWC."""
        with np.load(self.folder / name) as file:
            return jnp.asarray(file["image"].transpose(0, 2, 3, 1))

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

    def minigpt4(self, image_size: int, *, variant: str = NOQF) -> tuple[ModelConfig, Params]:
        """The composition without a Q-Former, for pictures of `image_size` pixels: config and full tree.

        MiniGPT-v2 (`variant`) is the same with other numbers once its LoRA is added to the language model's weights.
        """
        vit, conversion = self.vit("eva_vit.pth", image_size)
        language, params = self.llama(BASE_LLAMA)
        checkpoint = self.folder / variant / {NOQF: "proj.pth", V2: "minigptv2_ckpt.pth"}[variant]
        trained = {
            name: open_source(checkpoint).get(name) for name in open_source(checkpoint).names()
        }
        rows = trained["llama_proj.weight"].shape[1]
        config = dataclasses.replace(
            self.vit_model(vit), llama=language.llama, patches_per_token=rows // vit.width
        )
        full = {
            **params,
            "vit": conversion.params,
            "ln_vision": self.ln_vision(vit.width, variant=variant),
        }
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

    def ln_vision(self, width: int, *, variant: str = NOQF) -> dict[str, np.ndarray]:
        """Without the Q-Former nothing loads `ln_vision`: weight 1, bias 0, unless the set names others in force."""
        file = f"{variant}/encode_img.npz"
        held = self.arrays(file) if self.has(file) else {}
        return {
            "scale": held.get("ln_vision_weight", np.ones(width, np.float32)),
            "bias": held.get("ln_vision_bias", np.zeros(width, np.float32)),
        }

    def blip2_ln_vision(self) -> dict[str, np.ndarray]:
        """`ln_vision` of the Q-Former's file, where the released weights keep it."""
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
    return {name: discover() for name, discover in CASES.items()}


# --- discovery: one function per parameter that a test can ask for ----------------------------------------------------


def vit_cases() -> list[str]:
    """`grid4`, `half_grid6`...: the names in the report and, behind `vit_`, of the files."""
    return sorted(path.stem.removeprefix("vit_") for path in (FOLDER / VIT).glob("vit_*.npz"))


def vit_cases_with_blip2() -> list[str]:
    held = [
        name for name in vit_cases() if "tokens_ln_vision" in GOLDEN.keys(f"{VIT}/vit_{name}.npz")
    ]
    return held if GOLDEN.has(BLIP2) else []


def llama_folders() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("llama_*/forward.npz"))


def untied_llama_folders() -> list[str]:
    """Those with a head of their own, as every file of Meta's has."""
    return [
        name
        for name in llama_folders()
        if not GOLDEN.report(f"{name}/config.json").get("tie_word_embeddings", False)
    ]


def llama_bin_folders() -> list[str]:
    """Those that hold the same weights as safetensors and as `.bin`."""
    kinds = ("model*.safetensors", "pytorch_model*.bin")
    return [name for name in llama_folders() if all(any((FOLDER / name).glob(k)) for k in kinds)]


def weight_files() -> list[tuple[str, str]]:
    """(file or folder, option of the converter that takes it; none for MiniGPT-v2's)."""
    places = {
        f"{VIT}/*.pth": "--vit",
        "qformer/*.pth": "--qformer",
        "llama_*/config.json": "--llm",
        "minigpt4_*/proj*.pth": "--projection",
        f"{OPTIM}/trainer_checkpoint*.pth": "--projection",
        f"{V2}/*.pth": "",
    }
    return [
        (str((path.parent if path.suffix == ".json" else path).relative_to(FOLDER)), option)
        for pattern, option in places.items()
        for path in sorted(FOLDER.glob(pattern))
    ]


def v2_checkpoints() -> list[str]:
    return [name for name, option in weight_files() if not option]


def padded_cases() -> list[tuple[str, str]]:
    """(folder, name of the padded logits): `left_logits_cumsum_positions`, `right_logits`..."""
    return [
        (folder, key)
        for folder in llama_folders()
        for key in GOLDEN.keys(f"{folder}/forward.npz")
        if key.partition("_")[2].startswith("logits")
    ]


def greedy_cases() -> list[tuple[str, str]]:
    """(folder, case) of every generation without beams and without chance."""
    return [
        (path.parent.name, case)
        for path in sorted(FOLDER.glob("llama_*/generation.npz"))
        for case, knobs in GOLDEN.report(f"{path.parent.name}/report.json")["generation"][
            "cases"
        ].items()
        if is_greedy(knobs)
        and f"{case}__sequences" in GOLDEN.keys(f"{path.parent.name}/generation.npz")
    ]


def beam_cases() -> list[tuple[str, str]]:
    """(folder, case) of every beam search without chance."""
    return [
        (path.parent.name, case)
        for path in sorted(FOLDER.glob("llama_*/generation.npz"))
        for case, knobs in GOLDEN.report(f"{path.parent.name}/report.json")["generation"][
            "cases"
        ].items()
        if is_beam_search(knobs)
        and f"{case}__sequences" in GOLDEN.keys(f"{path.parent.name}/generation.npz")
    ]


def plain_greedy_cases() -> list[tuple[str, str]]:
    """Those without a repetition penalty, of which the result is the same however the prompt comes in."""
    return [
        (folder, case)
        for folder, case in greedy_cases()
        if "repetition_penalty"
        not in GOLDEN.report(f"{folder}/report.json")["generation"]["cases"][case]
    ]


def encode_cases() -> list[str]:
    return sorted(path.name for path in (FOLDER / NOQF).glob("encode_img*.npz"))


@functools.cache
def noqf_cases() -> dict[str, Any]:
    file = f"{NOQF}/cases.json"
    return GOLDEN.report(file) if GOLDEN.has(file) else {}


def forward_cases() -> list[tuple[str, str]]:
    """(folder, case) of training forwards on one picture each, of which the embedded ids were recorded.

    Of MiniGPT-v2 those that show a loss per sample or a cut prompt: no other case without a Q-Former does. Its LoRA
    model as a whole is not built yet.
    """
    return [
        (folder, name)
        for folder in (NOQF, V2)
        if GOLDEN.has(f"{folder}/cases.json")
        for name, case in GOLDEN.report(f"{folder}/cases.json").items()
        if "embedded_id_sequences_in_order" in case
        and GOLDEN.has(f"{folder}/{name}.npz")
        and has_one_picture(case)
        and (folder == NOQF or name.endswith(("reduction_none", "truncated")))
    ]


def has_one_picture(case: dict[str, Any]) -> bool:
    """Not a case of texts alone nor a conversation, whose questions stand among the answers (MiniGPT-v2)."""
    texts = case["prompts_given_to_prompt_wrap"]
    texts = [texts] if isinstance(texts, str) else texts or []
    return "conv_q" not in case and all(text.count(PLACEHOLDER) == 1 for text in texts)


def optim_report(name: str) -> dict[str, Any]:
    return GOLDEN.report(f"{OPTIM}/{name}") if GOLDEN.has(f"{OPTIM}/{name}") else {}


def schedule_cases() -> list[str]:
    return list(optim_report("lr_schedule.json").get("configs", {}))


def group_cases() -> list[str]:
    return list(optim_report("param_groups.json"))


def run_cases() -> list[str]:
    """Training runs of the original."""
    return [
        name for name in optim_report("trajectories.json") if GOLDEN.has(f"{OPTIM}/traj_{name}.npz")
    ]


def projection_run_cases() -> list[str]:
    """Those that train the projection alone. (They stand behind the Q-Former: only their updates can be compared.)"""
    return [name for name in run_cases() if not is_v2_run(name)]


def v2_run_cases() -> list[str]:
    """Those of MiniGPT-v2 whose LoRA settings and token ids the set holds."""
    return (
        [name for name in run_cases() if is_v2_run(name)] if GOLDEN.has(f"{V2}/cases.json") else []
    )


def is_v2_run(name: str) -> bool:
    return any("lora_" in key for key in GOLDEN.keys(f"{OPTIM}/traj_{name}.npz"))


def trainer_checkpoints() -> list[str]:
    return sorted(path.name for path in (FOLDER / OPTIM).glob("trainer_checkpoint*.pth"))


def answer_cases() -> list[tuple[str, str]]:
    """(file, case) of every answer of the batch generate method without beams and without chance."""
    return [
        (name, case)
        for name, record in noqf_cases().items()
        if name.endswith("generate") and GOLDEN.has(f"{NOQF}/{name}.npz")
        for case, knobs in record["cases"].items()
        if is_greedy(knobs["kwargs_reaching_llama_generate"])
    ]


def picture_cases() -> list[str]:
    """`tall.jpg`...: every file of the folder that is a picture with its arrays beside it."""
    files = sorted((FOLDER / IMAGES).glob("*"))
    return [
        file.name
        for file in files
        if file.suffix not in (".npz", ".json") and file.with_suffix(".npz").exists()
    ]


def picture_arrays(kind: str) -> list[tuple[str, str]]:
    """(picture, key) of every array of a kind: `decoded_rgb_u8`, `resized_u8_224`, `eval_448`..."""
    return [
        (name, key)
        for name in picture_cases()
        for key in GOLDEN.keys(f"{IMAGES}/{Path(name).stem}.npz")
        if key.startswith(kind)
    ]


def picture_differences() -> list[tuple[str, str]]:
    """(report, key) of every array that a newer Pillow computes otherwise; the key is `tall__resized_u8_224`."""
    return [
        (file.with_suffix(".json").name, key)
        for file in sorted((FOLDER / IMAGES).glob("pillow*_differences.npz"))
        for key in GOLDEN.keys(f"{IMAGES}/{file.name}")
    ]


def chat_cases() -> list[str]:
    """Conversations of several turns, drawn from the likeliest token alone."""
    return [
        name
        for name, case in noqf_cases().items()
        if "turns" in case and GOLDEN.has(f"{NOQF}/{name}.npz")
    ]


def dialogue_cases() -> list[tuple[str, str]]:
    """(format, dialogue) of every recorded conversation of strings."""
    file = "text/conversations.json"
    formats = GOLDEN.report(file) if GOLDEN.has(file) else {}
    return [
        (name, dialogue)
        for name, record in formats.items()
        if "dialogues" in record
        for dialogue in record["dialogues"]
    ]


def logits_cases() -> list[str]:
    file = "text/logits_processing.json"
    cases = GOLDEN.report(file)["cases"] if GOLDEN.has(file) else []
    return [f"case{number}" for number in range(len(cases))]


def text_files(*names: str) -> list[str]:
    """Those of `names` that the set holds in `text/`."""
    return [name for name in names if GOLDEN.has(f"text/{name}")]


def caption_cases() -> list[tuple[str, int]]:
    """(configuration, number) of every caption that the original's processor was given."""
    report = "images/report.json"
    pairs = GOLDEN.report(report).get("blip_caption", {}) if GOLDEN.has(report) else {}
    return [(name, number) for name, held in pairs.items() for number in range(len(held))]


def is_greedy(knobs: dict[str, Any]) -> bool:
    return knobs.get("num_beams", 1) == 1 and not knobs.get("do_sample", False)


def is_beam_search(knobs: dict[str, Any]) -> bool:
    return knobs.get("num_beams", 1) > 1 and not knobs.get("do_sample", False)


CASES: dict[str, Callable[[], list[Any]]] = {
    "vit_case": vit_cases,
    "vit_case_with_blip2": vit_cases_with_blip2,
    "llama_folder": llama_folders,
    "untied_llama_folder": untied_llama_folders,
    "llama_bin_folder": llama_bin_folders,
    "weight_file": weight_files,
    "v2_checkpoint": v2_checkpoints,
    "padded_case": padded_cases,
    "greedy_case": greedy_cases,
    "beam_case": beam_cases,
    "plain_greedy_case": plain_greedy_cases,
    "encode_case": encode_cases,
    "forward_case": forward_cases,
    "answer_case": answer_cases,
    "picture": picture_cases,
    "decoded_picture": lambda: picture_arrays("decoded_rgb_u8"),
    "resized_picture": lambda: picture_arrays("resized_u8_"),
    "processed_picture": lambda: picture_arrays("eval_"),
    "picture_difference": picture_differences,
    "chat_case": chat_cases,
    "dialogue_case": dialogue_cases,
    "logits_case": logits_cases,
    "conversations_file": lambda: text_files("conversations.json"),
    "postprocess_file": lambda: text_files("postprocess.json"),
    "stopping_file": lambda: text_files("stopping.json"),
    "tokenizer_file": lambda: text_files("tokenizer_cases.json"),
    "true_ids_file": lambda: text_files("llama_true_ids.json"),
    "schedule_case": schedule_cases,
    "group_case": group_cases,
    "run_case": run_cases,
    "projection_run_case": projection_run_cases,
    "v2_run_case": v2_run_cases,
    "trainer_checkpoint": trainer_checkpoints,
    "caption_case": caption_cases,
}

NOT_HELD = object()
"""Stands for a kind of case that the set does not hold; its tests are taken out of the collection again."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in set(CASES).intersection(metafunc.fixturenames):
        metafunc.parametrize(name, CASES[name]() or [NOT_HELD], ids=case_id, scope="session")


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
