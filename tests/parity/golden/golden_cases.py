"""Which cases a golden set holds: one function per parameter that a test can ask for.

For: finding cases by the layout of a set's files. Not for: reading a set (`conftest.py`) nor comparing anything.
Nothing of a set's sizes or values is written down here; a case that a set does not hold is not collected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

VIT, QFORMER, V1, NOQF, V2 = "eva_vit", "qformer", "minigpt4_v1", "minigpt4_noqf", "minigptv2"
OPTIM, IMAGES = "optim", "images"
BASE_LLAMA = "llama_mha"
"""The language model behind all compositions, as the README of the sets says."""
BLIP2, QFORMER_REPORT = "qformer/blip2_qformer.pth", "qformer/qformer_report.json"
COMPOSITIONS = (V1, NOQF, V2)
PLACEHOLDER = "<ImageHere>"


class GoldenSet(Protocol):
    """What the discovery needs of a set; see `conftest.py`."""

    folder: Path

    def has(self, name: str) -> bool: ...

    def keys(self, name: str) -> list[str]: ...

    def report(self, name: str) -> dict[str, Any]: ...


def vit_cases(golden: GoldenSet) -> list[str]:
    """`grid4`, `half_grid6`...: the names in the report and, behind `vit_`, of the files."""
    return sorted(
        path.stem.removeprefix("vit_") for path in (golden.folder / VIT).glob("vit_*.npz")
    )


def vit_cases_with_blip2(golden: GoldenSet) -> list[str]:
    held = [
        name
        for name in vit_cases(golden)
        if "tokens_ln_vision" in golden.keys(f"{VIT}/vit_{name}.npz")
    ]
    return held if golden.has(BLIP2) else []


def llama_folders(golden: GoldenSet) -> list[str]:
    return sorted(path.parent.name for path in golden.folder.glob("llama_*/forward.npz"))


def untied_llama_folders(golden: GoldenSet) -> list[str]:
    """Those with a head of their own, as every file of Meta's has."""
    return [
        name
        for name in llama_folders(golden)
        if not golden.report(f"{name}/config.json").get("tie_word_embeddings", False)
    ]


def llama_bin_folders(golden: GoldenSet) -> list[str]:
    """Those that hold the same weights as safetensors and as `.bin`."""
    kinds = ("model*.safetensors", "pytorch_model*.bin")
    return [
        name
        for name in llama_folders(golden)
        if all(any((golden.folder / name).glob(kind)) for kind in kinds)
    ]


def weight_files(golden: GoldenSet) -> list[tuple[str, str]]:
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
        (str((path.parent if path.suffix == ".json" else path).relative_to(golden.folder)), option)
        for pattern, option in places.items()
        for path in sorted(golden.folder.glob(pattern))
    ]


def v2_checkpoints(golden: GoldenSet) -> list[str]:
    """MiniGPT-v2's, which no option takes."""
    return [name for name, option in weight_files(golden) if not option]


def padded_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(folder, name of the padded logits): `left_logits_cumsum_positions`, `right_logits`..."""
    return [
        (folder, key)
        for folder in llama_folders(golden)
        for key in golden.keys(f"{folder}/forward.npz")
        if key.partition("_")[2].startswith("logits")
    ]


def greedy_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(folder, case) of every generation without beams and without chance."""
    return [
        (path.parent.name, case)
        for path in sorted(golden.folder.glob("llama_*/generation.npz"))
        for case, knobs in golden.report(f"{path.parent.name}/report.json")["generation"][
            "cases"
        ].items()
        if is_greedy(knobs)
        and f"{case}__sequences" in golden.keys(f"{path.parent.name}/generation.npz")
    ]


def beam_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(folder, case) of every beam search without chance."""
    return [
        (path.parent.name, case)
        for path in sorted(golden.folder.glob("llama_*/generation.npz"))
        for case, knobs in golden.report(f"{path.parent.name}/report.json")["generation"][
            "cases"
        ].items()
        if is_beam_search(knobs)
        and f"{case}__sequences" in golden.keys(f"{path.parent.name}/generation.npz")
    ]


def plain_greedy_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """Those without a repetition penalty, of which the result is the same however the prompt comes in."""
    return [
        (folder, case)
        for folder, case in greedy_cases(golden)
        if "repetition_penalty"
        not in golden.report(f"{folder}/report.json")["generation"]["cases"][case]
    ]


def qformer_cases(golden: GoldenSet) -> list[str]:
    """`qformer_a.npz`...: what the Q-Former made of image tokens, with and without a mask."""
    held = sorted(path.name for path in (golden.folder / QFORMER).glob("qformer_*.npz"))
    return held if golden.has(BLIP2) and golden.has(QFORMER_REPORT) else []


def encode_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(folder, file) of pictures and what each composition makes of them."""
    return [
        (folder, path.name)
        for folder in (V1, NOQF, V2)
        for path in sorted((golden.folder / folder).glob("encode_img*.npz"))
    ]


def composed_cases(golden: GoldenSet) -> list[tuple[str, str, str]]:
    """(folder, file of pictures, file of the image tower) of the compositions that the converter knows."""
    towers = sorted(path.name for path in (golden.folder / VIT).glob("*.pth"))
    held = [case for case in encode_cases(golden) if case[0] != V2]
    return [(*case, tower) for case in held for tower in towers]


def compositions(golden: GoldenSet) -> list[str]:
    """The models whose files the converter's command takes: behind the Q-Former, and without it."""
    held = [name for name in (V1, NOQF) if golden.has(f"{name}/proj.pth")]
    return [name for name in held if name != V1 or golden.has(BLIP2)]


def other_vit_files(golden: GoldenSet) -> list[str]:
    """The image tower in another precision."""
    files = sorted((golden.folder / VIT).glob("*.pth"))
    return [file.name for file in files if file.name != "eva_vit.pth"]


def forward_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(folder, case) of training forwards on pictures, of which the embedded ids were recorded.

    Of MiniGPT-v2 those that show a loss per sample or a cut prompt: its LoRA model as a whole is not built yet.
    """
    return [
        (folder, name)
        for folder in (V1, NOQF, V2)
        if golden.has(f"{folder}/cases.json")
        for name, case in golden.report(f"{folder}/cases.json").items()
        if "embedded_id_sequences_in_order" in case
        and golden.has(f"{folder}/{name}.npz")
        and shows_its_pictures(case, several="length" in golden.keys(f"{folder}/{name}.npz"))
        and (folder != V2 or name.endswith(("reduction_none", "truncated")))
    ]


def shows_its_pictures(case: dict[str, Any], *, several: bool) -> bool:
    """Not a case of texts alone nor a conversation, whose questions stand among the answers (MiniGPT-v2).

    Several pictures in a prompt count where the case has a `length`, their number: without it the original gives the
    second an empty place.
    """
    texts = case["prompts_given_to_prompt_wrap"]
    texts = [texts] if isinstance(texts, str) else texts or []
    counts = [text.count(PLACEHOLDER) for text in texts]
    return "conv_q" not in case and all(count == 1 or (several and count) for count in counts)


def optim_report(golden: GoldenSet, name: str) -> dict[str, Any]:
    return golden.report(f"{OPTIM}/{name}") if golden.has(f"{OPTIM}/{name}") else {}


def schedule_cases(golden: GoldenSet) -> list[str]:
    return list(optim_report(golden, "lr_schedule.json").get("configs", {}))


def group_cases(golden: GoldenSet) -> list[str]:
    return list(optim_report(golden, "param_groups.json"))


def run_cases(golden: GoldenSet) -> list[str]:
    """Training runs of the original."""
    return [
        name
        for name in optim_report(golden, "trajectories.json")
        if golden.has(f"{OPTIM}/traj_{name}.npz")
    ]


def model_run_cases(golden: GoldenSet) -> list[str]:
    """Those whose model the set holds whole: of MiniGPT-4 behind the Q-Former, and of MiniGPT-v2 with its LoRA."""
    return [
        name
        for name in run_cases(golden)
        if golden.has(f"{V2}/cases.json" if is_v2_run(golden, name) else f"{V1}/cases.json")
    ]


def is_v2_run(golden: GoldenSet, name: str) -> bool:
    return any("lora_" in key for key in golden.keys(f"{OPTIM}/traj_{name}.npz"))


def trainer_checkpoints(golden: GoldenSet) -> list[str]:
    return sorted(path.name for path in (golden.folder / OPTIM).glob("trainer_checkpoint*.pth"))


def answer_cases(golden: GoldenSet) -> list[tuple[str, str, str]]:
    """(folder, file, case) of every answer of the batch generate method without chance, with beams and without."""
    return [
        (folder, name, case)
        for folder, name, record in composition_cases(golden)
        if name.endswith("generate")
        for case, knobs in record["cases"].items()
        if not knobs["kwargs_reaching_llama_generate"].get("do_sample", False)
    ]


def composition_cases(golden: GoldenSet) -> list[tuple[str, str, dict[str, Any]]]:
    """(folder, case, its record) of whatever was run through one of the compositions, if its arrays are held."""
    return [
        (folder, name, record)
        for folder in COMPOSITIONS
        if golden.has(f"{folder}/cases.json")
        for name, record in golden.report(f"{folder}/cases.json").items()
        if golden.has(f"{folder}/{name}.npz")
    ]


def select_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(folder, case) of answers that were ranked by their losses."""
    return [
        (folder, name)
        for folder, name, record in composition_cases(golden)
        if "candidates_per_sample" in record
    ]


def picture_cases(golden: GoldenSet) -> list[str]:
    """`tall.jpg`...: every file of the folder that is a picture with its arrays beside it."""
    files = sorted((golden.folder / IMAGES).glob("*"))
    return [
        file.name
        for file in files
        if file.suffix not in (".npz", ".json") and file.with_suffix(".npz").exists()
    ]


def picture_arrays(golden: GoldenSet, kind: str) -> list[tuple[str, str]]:
    """(picture, key) of every array of a kind: `decoded_rgb_u8`, `resized_u8_224`, `eval_448`..."""
    return [
        (name, key)
        for name in picture_cases(golden)
        for key in golden.keys(f"{IMAGES}/{Path(name).stem}.npz")
        if key.startswith(kind)
    ]


def picture_differences(golden: GoldenSet) -> list[tuple[str, str]]:
    """(report, key) of every array that a newer Pillow computes otherwise; the key is `tall__resized_u8_224`."""
    return [
        (file.with_suffix(".json").name, key)
        for file in sorted((golden.folder / IMAGES).glob("pillow*_differences.npz"))
        for key in golden.keys(f"{IMAGES}/{file.name}")
    ]


def chat_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(folder, case) of conversations of several turns, drawn from the likeliest token alone."""
    return [
        (folder, name) for folder, name, record in composition_cases(golden) if "turns" in record
    ]


def dialogue_cases(golden: GoldenSet) -> list[tuple[str, str]]:
    """(format, dialogue) of every recorded conversation of strings."""
    file = "text/conversations.json"
    formats = golden.report(file) if golden.has(file) else {}
    return [
        (name, dialogue)
        for name, record in formats.items()
        if "dialogues" in record
        for dialogue in record["dialogues"]
    ]


def logits_cases(golden: GoldenSet) -> list[str]:
    file = "text/logits_processing.json"
    cases = golden.report(file)["cases"] if golden.has(file) else []
    return [f"case{number}" for number in range(len(cases))]


def text_files(golden: GoldenSet, *names: str) -> list[str]:
    """Those of `names` that the set holds in `text/`."""
    return [name for name in names if golden.has(f"text/{name}")]


def caption_cases(golden: GoldenSet) -> list[tuple[str, int]]:
    """(configuration, number) of every caption that the original's processor was given."""
    report = "images/report.json"
    pairs = golden.report(report).get("blip_caption", {}) if golden.has(report) else {}
    return [(name, number) for name, held in pairs.items() for number in range(len(held))]


def is_beam_search(knobs: dict[str, Any]) -> bool:
    """Beams without chance."""
    return knobs.get("num_beams", 1) > 1 and not knobs.get("do_sample", False)


def is_greedy(knobs: dict[str, Any]) -> bool:
    return knobs.get("num_beams", 1) == 1 and not knobs.get("do_sample", False)


CASES: dict[str, Callable[[GoldenSet], list[Any]]] = {
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
    "qformer_case": qformer_cases,
    "composed_case": composed_cases,
    "encode_case": encode_cases,
    "forward_case": forward_cases,
    "composition": compositions,
    "composition_with_bin": lambda golden: (
        compositions(golden) if BASE_LLAMA in llama_bin_folders(golden) else []
    ),
    "composition_on_vicuna": lambda golden: [x for x in compositions(golden) if x == V1],
    "other_vit_file": other_vit_files,
    "answer_case": answer_cases,
    "select_case": select_cases,
    "picture": picture_cases,
    "decoded_picture": lambda golden: picture_arrays(golden, "decoded_rgb_u8"),
    "resized_picture": lambda golden: picture_arrays(golden, "resized_u8_"),
    "processed_picture": lambda golden: picture_arrays(golden, "eval_"),
    "picture_difference": picture_differences,
    "chat_case": chat_cases,
    "dialogue_case": dialogue_cases,
    "logits_case": logits_cases,
    "conversations_file": lambda golden: text_files(golden, "conversations.json"),
    "postprocess_file": lambda golden: text_files(golden, "postprocess.json"),
    "stopping_file": lambda golden: text_files(golden, "stopping.json"),
    "tokenizer_file": lambda golden: text_files(golden, "tokenizer_cases.json"),
    "true_ids_file": lambda golden: text_files(golden, "llama_true_ids.json"),
    "schedule_case": schedule_cases,
    "group_case": group_cases,
    "run_case": run_cases,
    "model_run_case": model_run_cases,
    "trainer_checkpoint": trainer_checkpoints,
    "caption_case": caption_cases,
}
