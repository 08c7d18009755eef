"""A converted model on disk: what it is, its tokenizer's place, and its weights, one file per layer.

    NAME/manifest.json          the resolved preset (sizes, template, image processor); where the weights came from
    NAME/tokenizer.json, ...    see data/tokenizer.py
    NAME/weights/*.safetensors  one file per layer and one for the rest of each part, in the dtype of the source
    NAME/checksums.json         size and CRC-32 of all of these (checksums.py)

For: opening such a folder, on a local disk or in a bucket, and reading its weights straight onto devices: every device
gets its slice, cast, stacked or otherwise transformed on the way, and a host reads nothing that none of its devices
needs.
Not for: making one (`convert/model.py`), nor the checkpoints of a training run (`training/checkpoints.py`).

Why files per layer, and not one Orbax checkpoint: saving a stacked tree of 3.2 GB with Orbax took 5 to 6 GB of memory;
this way nobody ever holds more than a layer, an interrupted conversion goes on behind the last whole layer, and the
files are read by every safetensors library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from minigpt4_jax.checkpoint import CheckpointError, leaf_names, listed, require_same_trees
from minigpt4_jax.checksums import FILE as CHECKSUMS
from minigpt4_jax.checksums import damaged_files
from minigpt4_jax.config import UserError
from minigpt4_jax.presets import PRESETS, Preset, get_preset
from minigpt4_jax.schema import from_plain
from minigpt4_jax.weight_files import WeightFile, is_url, open_filesystem

FORMAT = "minigpt4_jax.model"
VERSION = 1
"""Of the folder. Raise it when an older version of this project must not read what this one writes."""
MANIFEST, WEIGHTS = "manifest.json", "weights"

Array = npt.NDArray[Any]
Tree = dict[str, Any]


def file_of(name: str) -> str:
    """The file that a parameter lies in: `llama/layers/3/mlp/up_proj/kernel` -> `llama.layers.3`, `llama/norm/scale` ->
    `llama`."""
    parts = name.split("/")
    layer = next((at for at, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: layer + 1])


def _group_of(name: str) -> str:
    """What is read together with a parameter: its layer, or the parameter alone."""
    layer = re.match(r".*?/\d+(?=/)", name)
    return layer[0] if layer else name


def _put(tree: Tree, name: str, leaf: Any) -> None:
    """Sets the leaf at a path such as `llama/norm/scale`."""
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


class ModelFolder:
    """An opened folder. Nothing but its manifest is read until it is asked for.

    Raises:
        UserError: no model folder there, one of a later version, or a manifest that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        manifest = self._read_manifest()
        self.sources: dict[str, Any] = manifest["sources"]
        """Where each part came from: file names, sizes, SHA-256."""
        self.settings: dict[str, Any] = manifest["settings"]
        """What the conversion was told; empty where a program decided it (`smol`)."""
        try:
            self.preset = from_plain(Preset, manifest["preset"])
            """Sizes, template, image processor and settings of an answer, as they were when it was converted."""
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._at(MANIFEST)} does not describe a model that this version knows ({error}). Convert it again."
            ) from error

    def _at(self, *names: str) -> str:
        return posixpath.join(self.path, *names)

    def _read_text(self, name: str) -> str:
        return self._read_bytes(name).decode()

    def _read_bytes(self, name: str) -> bytes:
        if is_url(self.path):
            fs, path = open_filesystem(self._at(name))
            content: bytes = fs.cat_file(path)
            return content
        return Path(self._at(name)).read_bytes()

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads(self._read_text(MANIFEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{self.path} is no model folder: there is no {MANIFEST} in it. Expected what `python -m convert` "
                "writes."
            ) from error
        except (ValueError, OSError) as error:
            raise UserError(
                f"{self._at(MANIFEST)} cannot be read ({error}). Convert it again."
            ) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(
                f"{self.path} is no model folder: its {MANIFEST} does not say {FORMAT!r}. Expected what `python -m "
                "convert` writes."
            )
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{self.path} has the version {manifest.get('version')}; this minigpt4_jax reads version {VERSION}. "
                "Convert it again, or use the version that wrote it."
            )
        return manifest

    def copy_beside_weights(self, folder: Path) -> None:
        """Copies everything but the weights, such as the tokenizer's files, to a local folder that exists."""
        for name in self._stored:
            if not name.startswith(f"{WEIGHTS}/"):
                (folder / name).write_bytes(self._read_bytes(name))

    @cached_property
    def _stored(self) -> dict[str, Any]:
        """The folder's files, sorted, those of weights with the folder they are in -> size and checksum."""
        try:
            return dict(sorted(json.loads(self._read_text(CHECKSUMS))["files"].items()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._at(CHECKSUMS)} cannot be read ({error!r}); expected the list of the folder's files. Copy or "
                "convert the folder again."
            ) from error

    @cached_property
    def _files(self) -> dict[str, WeightFile]:
        """Parameter path -> the file it is in."""
        found: dict[str, WeightFile] = {}
        for name in self._stored:
            if name.startswith(f"{WEIGHTS}/"):
                file = WeightFile(self._at(name))
                found |= dict.fromkeys(file.names(), file)
        return found

    def fingerprints(self) -> dict[str, str]:
        """Part -> SHA-256 of the file it came from, or of the SHA-256 sums of its files, one a line."""
        found = {}
        for part, source in self.sources.items():
            if not source["files"]:  # numbers that the original never loads
                continue
            sums = [file["sha256"] for file in source["files"]]
            found[part] = (
                sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()
            )
        return found

    def weight_fingerprints(self) -> dict[str, str]:
        """Part (`vit`, `query_tokens`, ...) -> SHA-256 over the names, sizes and CRC-32 of the files it is stored in.

        Of what is read, not of what it was made from: weights that a later version converts otherwise have another one.
        """
        found: dict[str, list[Any]] = defaultdict(list)
        for name, entry in self._stored.items():
            if name.startswith(f"{WEIGHTS}/"):
                found[posixpath.basename(name).partition(".")[0]].append([name, entry])
        return {
            part: hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
            for part, files in found.items()
        }

    def describe(self) -> str:
        """The folder, in the words of an error message."""
        return self.path

    def names(self) -> tuple[str, ...]:
        """Paths of all parameters, `llama/layers/0/mlp/up_proj/kernel`."""
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._files[name].shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Dtype that a parameter is stored in."""
        return self._files[name].dtype(name)

    def get(self, name: str) -> Array:
        """One whole parameter; of a local folder a view of the file."""
        return self._files[name].read(name)

    def require_whole(self, *, contents: bool = True) -> None:
        """Compares every file of a local folder with its checksum; one in a bucket is not read for that.

        Args:
            contents: False compares names and sizes alone.

        Raises:
            CheckpointError: what is missing, damaged or too much.
            NewerFormat: a later version of this project wrote it.
        """
        problems = [] if is_url(self.path) else damaged_files(Path(self.path), contents=contents)
        if problems is None:
            problems = [f"there is no {CHECKSUMS}"]
        if problems:
            raise CheckpointError(
                f"The model folder {self.path} is damaged: {listed(problems)}. Copy or convert it again."
            )

    def load(
        self,
        abstract: Tree,
        *,
        shardings: Tree | jax.sharding.Sharding | None = None,
        dtype: Any = None,
        transform: Callable[[Tree], Tree] | None = None,
    ) -> Tree:
        """Reads parameters onto devices, one layer after the other; what is in no layer leaf by leaf.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` with the parts that are wanted (top-level keys), in the layout
                `DISK`, or in `TRAIN`, whose leaves of repeated blocks are stacked while they are read. Of a part that
                is asked for, names and shapes must agree in both directions.
            shardings: one for all leaves or a tree of them; default: everything on the first device.
            dtype: read floating-point leaves as this dtype. Default: as stored.
            transform: replaces each layer as soon as it was read (`{"llama": {"layers": {"3": ...}}}`), and each leaf
                that is in none (`{"llama": {"norm": {"scale": ...}}}`); what it was made from is freed.

        Returns:
            A tree like `abstract` of `jax.Array`, or of what `transform` gave. Memory beside it: on a host what its
            devices hold of one leaf, on the devices nothing, or with `transform` the layer that it works on.

        Raises:
            CheckpointError: the folder holds another model; every difference is listed.
        """
        stacks = self._stacks
        stored = {
            name: jax.ShapeDtypeStruct(self._shape_of(name, members), self.dtype(members[0]))
            for name, members in stacks.items()
        }
        wanted = leaf_names(abstract)
        # What is wanted in stacks is not also wanted layer by layer, and the other way round.
        plain = {name: stored[name] for name in self._files if name.split("/")[0] in abstract}
        for name in wanted.keys() - plain.keys():
            if name in stacks:
                plain[name] = stored[name]
                for member in stacks[name]:
                    del plain[member]
        require_same_trees(plain, wanted, what=f"The model folder {self.path}", check_dtypes=False)
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if isinstance(shardings, jax.sharding.Sharding):
            placed = dict.fromkeys(wanted, shardings)
        else:
            placed = leaf_names(shardings)
        groups: dict[str, list[str]] = defaultdict(list)
        for name in wanted:
            groups[_group_of(name)].append(name)
        tree: Tree = {}
        for names in groups.values():
            part: Tree = {}
            for name in names:
                _put(part, name, self.place(name, placed[name], dtype=dtype))
            if transform is not None:
                # Waits: a host that reads ahead of the devices would fill them with layers that are still to be made.
                part = jax.block_until_ready(transform(part))
            for name, leaf in leaf_names(part).items():
                _put(tree, name, leaf)
        return tree

    @cached_property
    def _stacks(self) -> dict[str, list[str]]:
        """Path in either layout -> the stored parameters it is made of, in the order of the layers."""
        stacks: dict[str, list[str]] = {name: [name] for name in self._files}
        layers: dict[str, dict[int, str]] = defaultdict(dict)
        for name in self._files:
            found = re.search(r"/(\d+)/", name)
            if found:
                layers[name.replace(found[0], "/", 1)][int(found[1])] = name
        return stacks | {
            name: [by_number[i] for i in sorted(by_number)] for name, by_number in layers.items()
        }

    def _shape_of(self, name: str, members: list[str]) -> tuple[int, ...]:
        if name in self._files:
            return self.shape(name)
        shapes = {self.shape(member) for member in members}
        if len(shapes) > 1:
            raise CheckpointError(
                f"The layers of {name} in {self.path} have the shapes {sorted(shapes)}; expected one, to stack them."
            )
        return (len(members), *shapes.pop())

    def place(self, name: str, sharding: jax.sharding.Sharding, *, dtype: Any = None) -> jax.Array:
        """One parameter onto devices: by its path in the layout `DISK`, or in `TRAIN`, then stacked. As `load` does."""
        members = self._stacks[name]
        shape = self._shape_of(name, members)
        stored = self.dtype(members[0])
        target = (
            dtype if dtype is not None and jax.numpy.issubdtype(stored, np.floating) else stored
        )

        found: dict[tuple[tuple[int | None, int | None], ...], Array] = {}

        def part(index: tuple[slice, ...] | None) -> Array:
            """Once for all devices that hold the same part."""
            where = tuple((cut.start, cut.stop) for cut in index or ())
            if where not in found:
                found[where] = read(index or ())
            return found[where]

        def read(index: tuple[slice, ...]) -> Array:
            if name in self._files:
                return np.asarray(self._files[name].read(name, index)).astype(target)
            chosen = members[index[0]] if index else members
            slices = [self._files[member].read(member, index[1:]) for member in chosen]
            stack = np.empty((len(slices), *slices[0].shape), target)
            for at, piece in enumerate(slices):
                stack[at] = piece
            return stack

        return jax.make_array_from_callback(shape, sharding, part)


def manifest_of(
    preset: Preset, sources: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What `manifest.json` holds."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "preset": dataclasses.asdict(preset),
        "sources": dict(sources),
        "settings": dict(settings),
    }


def find_preset(name: str) -> Preset:
    """Sizes and conventions of a preset, or of the model folder at a path or URL.

    Raises:
        UserError: it is neither.
    """
    return get_preset(name) if name in PRESETS else open_folder(name).preset


def open_folder(name: str) -> ModelFolder:
    """The model folder at a path or URL that a person typed where a preset could stand too. Raises as `find_preset`."""
    try:
        return ModelFolder(name)
    except UserError as error:
        if is_url(name) or Path(name).exists():
            raise
        raise UserError(
            f"There is no model {name!r}: no folder of that name, and no preset. Expected one of "
            f"{', '.join(sorted(PRESETS))}, or a folder that `python -m convert` wrote."
        ) from error
