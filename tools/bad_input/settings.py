"""The cases about a training run's settings: the YAML file and the `key=value` overrides."""

from __future__ import annotations

from typing import Any

from case import YAML, Case, write
from weights import tiny_model


def settings(what: str, says: str, *overrides: str, yaml: bytes | str = YAML, **more: Any) -> Case:
    return Case(
        group="Settings",
        what=what,
        command=("train.py", "--config", "run.yaml", *overrides),
        says=says,
        prepare=write("run.yaml", yaml),
        **more,
    )


SETTINGS = (
    settings("an unknown key", "'optmizer.*Did you mean 'optimizer'", yaml="optmizer: {}\n"),
    settings(
        "an unknown key in a section",
        "Did you mean 'optimizer.init_lr'",
        yaml="optimizer:\n  init_rl: 1\n",
    ),
    settings(
        "an unknown key on the command line", "Did you mean 'data.batch_size'", "data.batchsize=3"
    ),
    settings("a key in the wrong section", "Did you mean 'optimizer.init_lr'", "init_lr=1e-3"),
    settings(
        "a word for a number",
        "batch_size is 'many'; expected a whole number",
        "data.batch_size=many",
    ),
    settings(
        "a section that is a number", "optimizer is 3; expected a section", yaml="optimizer: 3\n"
    ),
    settings(
        "an impossible number", "batch_size is 0; expected a number above 0", "data.batch_size=0"
    ),
    settings("infinity", "init_lr is inf; expected", "optimizer.init_lr=.inf"),
    settings("an unknown choice", "expected one of auto", "dtype=float8"),
    settings("no key=value", "is not an override; expected key=value", "data.batch_size"),
    settings("broken YAML", "cannot be read as YAML", yaml="data: [1\n"),
    settings("a binary file as YAML", "cannot be read as YAML", yaml=bytes(range(256))),
    Case(
        group="Settings",
        what="no such configuration",
        command=("train.py", "--config", "no.yaml"),
        says="no configuration file",
    ),
    Case(
        group="Settings",
        what="a folder as YAML",
        command=("train.py", "--config", "."),
        says="cannot be read as YAML",
    ),
    settings("no training set", "nowhere", "data.folder=nowhere", patch=tiny_model),
    settings("an unknown preset", "no model 'huge'", "model=huge"),
)
