"""Which file each part of a model comes from, and the table that reads it: from settings to plans.

For: `open_model`, which opens all sources of a preset, checks that they belong together, and lays their tables over the
model. Not for: reading values and writing (`model.py`), what a single format means (`eva_vit.py`, `qformer.py`,
`llama_files.py`, `projection.py`).

Differs from the original, whose parts are URLs in its code and which finds out that two of them do not belong together
by what the model says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import detect, eva_vit, qformer
from convert.llama_files import OpenedLlama, open_llama
from convert.projection import read_projection
from convert.rules import Excuse, Plan, Rule, identity
from convert.settings import ConvertConfig
from convert.sources import ArraySource, TensorSource, open_source
from convert.tokenizer import convert_tokenizer
from minigpt4_jax.config import ModelConfig, UserError, VitConfig
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import Preset


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """All parts of a model, opened."""

    preset: Preset
    """As asked for, with what the language model's files decide."""
    plans: dict[str, Plan]
    """By part; together they fill every parameter."""
    facts: dict[str, dict[str, Any]]
    """By part, what its source says of itself: licence and training of a projection of this project."""
    tokenizer: Callable[[Path], tuple[str, ...]]
    """Writes the tokenizer's files into a folder and returns what a person should know of them."""
    notes: tuple[str, ...]
    """What a person should know."""


def open_model(settings: ConvertConfig, name: str) -> OpenedModel:
    """Opens the sources of the preset `name`. Reads headers and a few norms, not the weights.

    Raises:
        UserError: a file that is missing, is something else, or belongs to another model.
    """
    preset = settings.resolved(name)
    settings.require_given(name, preset)
    language = open_llama(
        Path(settings.llm),
        delta=Path(settings.delta) if settings.delta else None,
        max_positions=preset.model.llama.max_positions,
    )
    where = language.source.describe()
    notes = detect.check_language_model(language.config, preset.model.llama, where=where)
    model = dataclasses.replace(preset.model, llama=language.config)
    preset = dataclasses.replace(preset, model=model)
    abstract = abstract_params(model)
    excuses = tuple(Excuse(pattern, "left out as asked") for pattern in settings.excuse)
    dtype = None if settings.dtype == "source" else settings.dtype

    def plan(
        source: TensorSource, rules: Sequence[Rule], own: Sequence[Excuse], parts: Sequence[str]
    ) -> Plan:
        target = {part: abstract[part] for part in parts}
        return Plan(
            source, rules, excuses=(*own, *_asked(excuses, source)), target=target, dtype=dtype
        )

    plans: dict[str, Plan] = {}
    vit = open_source(Path(settings.vit))
    rules, own = _vit_table(vit, model.vit)
    plans["vit"] = plan(vit, _under("vit", rules), own, ["vit"])
    if model.qformer is not None:
        source = open_source(Path(settings.qformer))
        detect.require_option(source, "--qformer")
        naming = qformer.naming_of(source)
        rules = qformer.qformer_rules(model.qformer, naming)
        plans["qformer"] = plan(source, rules, qformer.qformer_excuses(naming), qformer.PARTS)
    else:
        untouched = ArraySource(eva_vit.plain_ln_vision(model.vit))
        plans["ln_vision"] = plan(untouched, _copied("ln_vision", untouched), (), ["ln_vision"])
    plans["llama"] = plan(
        language.source, _under("llama", language.rules), language.excuses, ["llama"]
    )
    path = Path(settings.projection)
    released = open_source(path)
    # Small enough to be read at once, with all checks of its own.
    arrays, info = read_projection(path, model, dtype=None, excuses=_asked(excuses, released))
    left_out = [n for n in released.names() if any(e.matches(n) for e in excuses)]
    if left_out:
        notes += (f"{path}: {', '.join(left_out)}: left out as asked",)
    projection = ArraySource(arrays, files=(path,))
    plans["llama_proj"] = plan(projection, _copied("llama_proj", projection), (), ["llama_proj"])
    _require_excuses_used(excuses, [*(p.source for p in plans.values()), released])

    def tokenizer(folder: Path) -> tuple[str, ...]:
        # A delta comes with the tokenizer of what it makes.
        source = Path(settings.tokenizer or settings.delta or settings.llm)
        return convert_tokenizer(source, folder, vocab_size=model.llama.vocab_size).notes

    return OpenedModel(
        preset=preset,
        plans=plans,
        facts={} if info is None else {"llama_proj": info.facts()},
        tokenizer=tokenizer,
        notes=(*language.notes, *notes),
    )


def llama_plan(opened: OpenedLlama, config: ModelConfig) -> Plan:
    """The plan of the language model alone, stored as in its source."""
    target = {"llama": abstract_params(config)["llama"]}
    rules = _under("llama", opened.rules)
    return Plan(opened.source, rules, excuses=opened.excuses, target=target)


def _under(part: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    return tuple(dataclasses.replace(rule, target=f"{part}/{rule.target}") for rule in rules)


def _vit_table(
    source: TensorSource, config: VitConfig
) -> tuple[tuple[Rule, ...], tuple[Excuse, ...]]:
    if detect.require_option(source, "--vit") is detect.Kind.BLIP2:
        return eva_vit.hf_vit_rules(config), eva_vit.HF_VIT_EXCUSES
    return eva_vit.eva_rules(config), eva_vit.eva_excuses(config)


def _copied(part: str, source: TensorSource) -> tuple[Rule, ...]:
    return tuple(Rule(f"{part}/{name}", (name,), identity) for name in source.names())


def _asked(excuses: Sequence[Excuse], source: TensorSource) -> tuple[Excuse, ...]:
    """Those that were asked for and that this source has a tensor for."""
    return tuple(e for e in excuses if any(map(e.matches, source.names())))


def _require_excuses_used(excuses: Sequence[Excuse], sources: Sequence[TensorSource]) -> None:
    idle = [
        excuse.pattern
        for excuse in excuses
        if not any(excuse.matches(name) for source in sources for name in source.names())
    ]
    if idle:
        raise UserError(
            f"--excuse {', '.join(idle)}: no source has a tensor of that name. Check the spelling, or leave it out."
        )
