"""config.py: what a user may write in YAML and on the command line, and what is said when it is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.config_file import load, to_yaml
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Part:
    rate: float = 1.0
    kind: Literal["flat", "cosine"] = "flat"
    mean: tuple[float, float, float] = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Whole:
    steps: int
    part: Part = field(default_factory=Part)
    parts: dict[str, Part] = field(default_factory=dict)
    note: str | None = None
    fast: bool = False


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 10\npart:\n  rate: 2e-3\n  kind: cosine\n")
    assert load(Whole, path, ["part.rate=0.5", "note=hello"]) == Whole(
        steps=10, part=Part(rate=0.5, kind="cosine"), note="hello"
    )


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    assert load(Whole, write(tmp_path, "steps: 1\npart: {rate: 1e-4}")).part.rate == 1e-4


def test_lists_become_tuples_and_dicts_of_dataclasses_are_built() -> None:
    made = load(Whole, None, ["steps=1", "part.mean=[1, 2, 3]", "parts.a.rate=7"])
    assert made.part.mean == (1.0, 2.0, 3.0)
    assert made.parts == {"a": Part(rate=7.0)}


@pytest.mark.parametrize(
    "config", [TrainConfig(), PRESETS["smol"].model, PRESETS["vicuna-7b"].model, Whole(steps=3)]
)
def test_printed_config_reads_back_equal(config: object, tmp_path: Path) -> None:
    assert load(type(config), write(tmp_path, to_yaml(config))) == config


def test_sections_that_may_be_null_are_read_and_checked_like_any_other(tmp_path: Path) -> None:
    # The Q-Former of a model that has none is null; another's is a section.
    path = write(tmp_path, to_yaml(PRESETS["tiny-qformer"].model))
    changed = load(ModelConfig, path, ["qformer.num_queries=7"])
    assert changed.num_image_tokens == 7
    without = load(ModelConfig, path, ["qformer=null", "patches_per_token=4"])
    assert without == PRESETS["tiny"].model
    with pytest.raises(UserError) as caught:
        load(ModelConfig, path, ["qformer.querys=7", "qformer.width=wide"])
    assert "unknown key 'qformer.querys'" in str(caught.value)
    assert "qformer.width is 'wide'; expected a whole number" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"patches_per_token": None}, {"qformer": PRESETS["tiny-qformer"].model.qformer}],
)
def test_image_tokens_come_from_patches_or_from_a_qformer_and_not_from_both_or_neither(
    change: dict[str, Any],
) -> None:
    with pytest.raises(UserError, match="expected one of the two and None for the other"):
        replace(PRESETS["tiny"].model, **change)


def test_every_unknown_key_is_named_with_its_source_and_the_closest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 1\nparts_: {}\npart:\n  ratte: 3\n")
    with pytest.raises(UserError) as caught:
        load(Whole, path, ["rate=1", "zzz=1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: unknown key 'parts_'. Did you mean 'parts'?"
    assert lines[1] == f"{path}: unknown key 'part.ratte'. Did you mean 'part.rate'?"
    assert lines[2] == "override 'rate=1': unknown key 'rate'. Did you mean 'part.rate'?"
    assert lines[3].startswith("override 'zzz=1': unknown key 'zzz'. The keys here are steps, part")


@pytest.mark.parametrize(
    ("override", "expectation"),
    [
        ("steps=1.5", "steps is 1.5; expected a whole number"),
        ("steps=true", "steps is True; expected a whole number"),
        ("part.rate=fast", "part.rate is 'fast'; expected a number"),
        ("part.kind=linear", "part.kind is 'linear'; expected one of flat, cosine"),
        ("part.mean=[1, 2]", "part.mean is [1, 2]; expected a list of 3: a number, a number"),
        ("part.mean=[1, 2, x]", "part.mean is [1, 2, 'x']; expected a list of 3"),
        ("part=3", "part is 3; expected a section with the keys rate, kind, mean"),
        ("part=null", "part is None; expected a section"),
        ("fast=perhaps", "fast is 'perhaps'; expected true or false"),
        ("parts.a.ratte=1", "Did you mean: 'rate'?"),
        ("part.rate.x=1", "part.rate is {'x': 1}; expected a number"),
        ("note=no", "note is False; expected text or null"),
    ],
)
def test_wrong_types_give_value_and_expectation(override: str, expectation: str) -> None:
    with pytest.raises(UserError) as caught:
        load(Whole, None, ["steps=1", override])
    assert expectation in str(caught.value)


@pytest.mark.parametrize("override", ["steps", "--steps=3", "=3", "note=[1"])
def test_what_is_not_an_override_is_refused(override: str) -> None:
    with pytest.raises(UserError):
        load(Whole, None, ["steps=1", override])


def test_every_missing_value_is_named() -> None:
    with pytest.raises(UserError) as caught:
        load(ModelConfig, None, ["vit.width=32"])
    message = str(caught.value)
    assert "llama is not set" in message
    assert "vit.norm_eps is not set and has no default; expected a number" in message
    assert "vit.width" not in message


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "steps: [1\n", "steps: 1\nsteps: 2\n", "steps: ${nothing}\n", "12"]
)
def test_unreadable_yaml_is_a_user_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=str(path)):
        load(Whole, path)


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file"):
        load(Whole, tmp_path / "nowhere.yaml")


def test_checks_of_the_dataclass_itself_reach_the_user() -> None:
    with pytest.raises(UserError, match="warmup_steps is 100"):
        load(TrainConfig, None, ["optimizer.max_steps=3"])


def test_the_yaml_library_is_imported_only_when_reading() -> None:
    source = Path(load.__code__.co_filename).read_text()
    assert "\nfrom omegaconf" not in source
    assert "\nimport omegaconf" not in source


@pytest.mark.parametrize("value", ["0", "-1", ".inf", ".nan"])
def test_a_rate_that_is_no_number_above_zero_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"init_lr is .*; expected a number above 0"):
        load(TrainConfig, None, [f"optimizer.init_lr={value}"])


def test_a_folder_in_place_of_the_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"Is a directory.*Expected a text file of `key: value` lines"
    ):
        load(Whole, tmp_path)
