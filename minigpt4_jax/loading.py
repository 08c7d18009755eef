"""Where weights come from: by a preset's name or a folder's path, to parameters on devices.

For: everything that needs a model's weights (`api.py`, training's entry point, benchmarks): which files belong to a
name, the dtype, the projection that is shipped, and what a person can do when a file is damaged.
Not for: reading one folder (`model_folder.py`), making one (`convert/`), nor what is then done with the weights.

Differs from the original, whose YAML files hold a path to every part and load them into a model object one after the
other, with missing names accepted (`strict=False`).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from minigpt4_jax.checkpoint import compare_trees
from minigpt4_jax.config import UserError
from minigpt4_jax.data.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.model_folder import ModelFolder, find_preset, open_folder
from minigpt4_jax.models.layout import DISK, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import Params, abstract_params
from minigpt4_jax.presets import PRESETS, Preset
from minigpt4_jax.sharding import cache_sharding, make_shardings
from minigpt4_jax.weight_files import is_url

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, parts done, parts in all)."""
Read = TypeVar("Read")


def pick_dtype(name: str) -> Any:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU, where XLA emulates bfloat16."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype is {name!r}; expected one of auto, float32, bfloat16.")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def shipped_projection(name: str) -> Path:
    """The projection that comes with the package. Raises `UserError` where there is none."""
    path = Path(__file__).parent / "assets" / f"{name}_projection.safetensors"
    if not path.is_file():
        raise UserError(
            f"The package ships no projection for {name!r}. For a published model convert its weights (`python -m "
            f"convert {name} --help`) and give the folder; otherwise train a projection (train.py) and pass its file."
        )
    return path


def load_projection(name: str, projection: str | Path | None, *, preset: Preset) -> Params:
    """`llama_proj`, as it is stored: from a file, from the model folder, or the one that is shipped for a preset.

    Args:
        name: the model, as `load_frozen` takes it.
        projection: a projection file; None: the folder's or the shipped one.
        preset: of the model; the projection must fit it.

    Raises:
        UserError: no projection there, a damaged file, or one of another model.
    """
    from convert.projection import read_projection

    if projection is not None or name in PRESETS:
        path = Path(projection) if projection is not None else shipped_projection(name)
        return read_projection(path, preset.model)[0]
    folder = open_folder(name)
    if "llama_proj/kernel" not in folder.names():
        raise UserError(
            f"The model folder {name} holds no projection. Train one (train.py) and pass its file."
        )
    part: Params = folder.load({"llama_proj": abstract_params(preset.model)["llama_proj"]})
    llama_proj: Params = part["llama_proj"]
    return llama_proj


def load_frozen(
    name: str, *, dtype: Any = None, progress: Progress | None = None
) -> tuple[Params, Tokenizer]:
    """The frozen parts (all but `llama_proj`; `DISK` layout) and the tokenizer of a model, as `MiniGPT4.load` takes it.

    Args:
        dtype: of the arrays; None: as they are stored, which is float32 for `smol`.

    Raises:
        UserError: the preset has no weights that can be fetched, fetching or converting them failed, or the folder is
            damaged.
    """
    return _load(
        name, lambda folder: folder.load(_frozen(folder.preset), dtype=dtype), progress=progress
    )


def load_decode_params(
    name: str,
    *,
    dtype: Any,
    layout: Layout,
    projection: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[Params, Tokenizer]:
    """All parameters of a model in the layout that the engine reads, and its tokenizer.

    Each layer is read, cast and brought into `layout` before the next one is read: the devices never hold more than one
    layer beside the result, so that what fits them as int8 can be loaded as int8.

    Args:
        name: `smol`, or a model folder, as `MiniGPT4.load` takes it.
        dtype: of floating-point leaves, before they are brought into `layout`.
        layout: one that `models.layout.convert_layout` makes from `DISK`.
        projection: a projection file; None: the folder's or the shipped one.
        mesh: shards everything by `sharding.RULES`, each device reading its part; None: the first device. `layout` must
            be cut for it: `shards` is its axis `tensor`.
        progress: told what is being converted where the model must be made first.

    Raises:
        UserError: as `load_frozen` and `load_projection`, or the mesh does not divide the model.
        ValueError: `layout` is cut for another mesh.
    """
    shards = 1 if mesh is None else mesh.shape["tensor"]
    if layout.shards != shards:
        raise ValueError(
            f"layout.shards is {layout.shards}; expected {shards}, the mesh's axis tensor."
        )
    preset = find_preset(name)
    if mesh is not None:
        cache_sharding(mesh, num_kv_heads=preset.model.llama.num_kv_heads)
    # Before minutes of fetching and loading: the wrong file is said at once.
    llama_proj = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(dtype),
        load_projection(name, projection, preset=preset),
    )

    def place(tree: Params) -> Any:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return make_shardings(mesh, tree)

    convert = functools.partial(
        convert_layout, source=DISK, target=layout, llama=preset.model.llama
    )
    # A mesh that does not fit is said at once too.
    shardings = place(frozen := _frozen(preset))
    place(jax.eval_shape(convert, frozen))
    params, tokenizer = _load(
        name,
        lambda folder: folder.load(
            frozen, shardings=shardings, dtype=dtype, transform=_by_layer(convert, place)
        ),
        progress=progress,
    )
    whole = {"llama_proj": llama_proj}
    return {**params, **jax.device_put(whole, place(whole))}, tokenizer


class FrozenFolder:
    """The frozen weights of a model folder, as `training.frozen.FrozenWeights` asks for them: nothing is read before
    it is asked for, and of that a process reads what its own devices hold.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._abstract = _frozen(folder.preset)

    def fingerprints(self) -> dict[str, str]:
        """Part (`vit`, `llama`, ...) -> digest of the files it is stored in."""
        sums = self._folder.weight_fingerprints()
        return {part: digest for part, digest in sums.items() if part in self._abstract}

    def load(
        self,
        parts: Collection[str],
        *,
        layout: Layout,
        dtype: DTypeLike,
        place: Callable[[Params], Any],
    ) -> Params:
        """Some parts on devices.

        Args:
            parts: such as `llama`, or `config.vision_parts`.
            layout: `DISK` or `TRAIN`; stacked while they are read.
            dtype: of the arrays, whatever they are stored as.
            place: the tree of the parts -> its shardings: one for all leaves, or a tree like it.
        """
        convert = functools.partial(
            convert_layout, source=DISK, target=layout, llama=self._folder.preset.model.llama
        )
        wanted = jax.eval_shape(convert, {part: self._abstract[part] for part in parts})
        return self._folder.load(wanted, shardings=place(wanted), dtype=dtype)

    def read(self, name: str) -> np.ndarray:
        """One parameter on the host as it is stored, by its path in the layout `DISK`."""
        return self._folder.get(name)


def open_frozen(name: str, *, progress: Progress | None = None) -> tuple[FrozenFolder, Tokenizer]:
    """The frozen parts of a model, not yet read, and its tokenizer. Raises as `load_frozen`."""
    return _load(name, FrozenFolder, progress=progress)


def _frozen(preset: Preset) -> Params:
    """The abstract tree of everything but the projection."""
    return {
        part: tree for part, tree in abstract_params(preset.model).items() if part != "llama_proj"
    }


def _by_layer(
    convert: Callable[[Params], Params], place: Callable[[Params], Any]
) -> Callable[[Params], Params]:
    """`convert` for one part after the other; `place` says where a tree's leaves lie.

    Compiled once for all layers of a tower: inside, every one of them has the number 0.
    """

    def transform(part: Params) -> Params:
        first = _renumbered(part, "0")
        wanted = jax.eval_shape(convert, first)
        if not compare_trees(first, wanted):
            return part  # the layouts agree here: the image tower, norms
        number = next((key for key in _keys(part) if key.isdigit()), "0")
        made: Params = jax.jit(convert, out_shardings=place(wanted))(first)
        return _renumbered(made, number)

    return transform


def _renumbered(tree: Params, number: str) -> Params:
    """The tree with every layer's number replaced."""
    return {
        number if key.isdigit() else key: _renumbered(sub, number) if isinstance(sub, dict) else sub
        for key, sub in tree.items()
    }


def _keys(tree: Params) -> Iterator[str]:
    for key, sub in tree.items():
        yield key
        if isinstance(sub, dict):
            yield from _keys(sub)


def _load(
    name: str, read: Callable[[ModelFolder], Read], *, progress: Progress | None
) -> tuple[Read, Tokenizer]:
    """What `read` makes of a model's folder, and the tokenizer."""
    if name in PRESETS and name != "smol":
        raise UserError(
            f"There are no weights to fetch for the preset {name!r}: convert the published ones (`python -m convert "
            f"{name} --help`) and give the folder."
        )
    folder = _folder_of(name, progress=progress)
    try:
        # The processes of a run share the folder: the first one reads all of it, the others their part alone.
        folder.require_whole(contents=jax.process_index() == 0)
        tokenizer = _tokenizer_of(folder)
        return read(folder), tokenizer
    except UserError as error:
        if name != "smol":
            raise
        raise UserError(
            f"{error}\nThese files were made from the fetched ones. Remove the folder {folder.path} and run the "
            "command again: it is made anew."
        ) from error


def _tokenizer_of(folder: ModelFolder) -> Tokenizer:
    """The folder's tokenizer, fetched first if it lies in a bucket."""
    if not is_url(folder.path):
        return load_tokenizer(folder.path)
    with tempfile.TemporaryDirectory() as scratch:
        folder.copy_beside_weights(Path(scratch))
        return load_tokenizer(scratch)


def frozen_parts(name: str) -> dict[str, str]:
    """Which files the frozen parts of a model came from: part -> SHA-256. Empty for a preset with random weights."""
    if name in PRESETS and name != "smol":
        return {}
    sums = _folder_of(name).fingerprints()
    return {part: digest for part, digest in sums.items() if part != "llama_proj"}


def _folder_of(name: str, *, progress: Progress | None = None) -> ModelFolder:
    if name == "smol":
        from convert.smol import prepare_smol

        return ModelFolder(prepare_smol(progress))
    return open_folder(name)
