"""What a conversion is told: the files, the preset, the excuses. The same on the command line and in a YAML file.

For: `ConvertConfig`, checked as far as it can be without opening anything. Not for: opening files (`parts.py`) and
reading YAML (`minigpt4_jax/config_file.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minigpt4_jax.config import UserError
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.presets import Preset, get_preset
from minigpt4_jax.schema import from_plain

PATHS = ("vit", "qformer", "llm", "delta", "projection", "tokenizer")
"""Settings that name a file or a folder."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """One conversion of a whole model. An empty path: not given."""

    vit: str = ""
    """`eva_vit_g.pth`, or a Hugging Face BLIP-2 or InstructBLIP."""
    qformer: str = ""
    """`blip2_pretrained_flant5xxl.pth`, or the same Hugging Face model: Q-Former, query tokens and `ln_vision`."""
    llm: str = ""
    """The language model: a Hugging Face folder, a folder with Meta's `consolidated.NN.pth`, or a `.gguf`."""
    delta: str = ""
    """A Vicuna delta, added to `llm` tensor by tensor."""
    projection: str = ""
    """`pretrained_minigpt4*.pth`, a checkpoint of the original's trainer, or this project's `.safetensors`."""
    tokenizer: str = ""
    """A `tokenizer.model` or a folder that has one. Empty: what lies with the language model."""
    out: str = ""
    """The folder to write."""
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """What weights are stored as; a host casts while it reads, so `source` loses nothing."""
    excuse: tuple[str, ...] = ()
    """Tensors that are left out: names in which `{i}` is a number and `*` anything."""
    model: dict[str, Any] = field(default_factory=dict)
    """Sizes other than the preset's: `{vit: {num_layers: 3}}`."""

    def resolved(self, name: str) -> Preset:
        """The preset `name` with the sizes in `model`.

        Raises:
            UserError: no such preset, or sizes that it has no place for.
        """
        preset = get_preset(name)
        if not self.model:
            return preset
        try:
            return from_plain(Preset, _merge(dataclasses.asdict(preset), {"model": self.model}))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The sizes model={self.model} do not fit the preset {name!r} ({error}); expected those of "
                "ModelConfig, such as model.vit.num_layers=3."
            ) from error

    def require_given(self, name: str, preset: Preset) -> None:
        """Raises `UserError` listing the paths that the preset `name` needs and that are not given, and the reverse."""
        needed = {"vit", "llm", "projection"} | ({"qformer"} if preset.model.qformer else set())
        missing = sorted(path for path in needed if not getattr(self, path))
        if missing:
            raise UserError(
                f"{name} is made of more files than were given; missing: {', '.join(f'--{m}' for m in missing)}. "
                "`python -m convert --help` says which file each one is."
            )
        if self.qformer and not preset.model.qformer:
            raise UserError(
                f"--qformer is {self.qformer}, but {name} has no Q-Former. Leave it out, or choose a preset that has "
                "one."
            )

    def require_there(self, folder: str) -> None:
        """Raises `UserError` listing the paths that have gone since `folder` was made from them."""
        paths = {name: getattr(self, name) for name in PATHS}
        gone = [
            f"--{name} {path}" for name, path in paths.items() if path and not Path(path).exists()
        ]
        if gone:
            raise UserError(
                f"{folder} was made from files that are not where they were: {', '.join(gone)}. Give the same options "
                "with the places they have now."
            )

    def absolute(self) -> ConvertConfig:
        """The same with absolute paths, so that `verify` finds them from anywhere."""
        paths = {name: getattr(self, name) for name in PATHS}
        found: dict[str, Any] = {
            name: str(Path(path).absolute()) for name, path in paths.items() if path
        }
        return dataclasses.replace(self, **found)

    @staticmethod
    def of_folder(folder: ModelFolder) -> tuple[str, ConvertConfig]:
        """The preset's name and the settings that a converted folder remembers.

        Raises:
            UserError: it was not written by a conversion of a whole model.
        """
        stored = dict(folder.settings)
        if "preset" not in stored:
            raise UserError(
                f"{folder.path} does not remember its sources; expected what `python -m convert PRESET` wrote."
            )
        return stored.pop("preset"), from_plain(ConvertConfig, stored)


def _merge(base: Any, over: Any) -> Any:
    """`base` with the values of `over`, section by section."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}
