"""Memory and time of a conversion at full size, beside a plain copy of the same bytes.

    python benchmarks/convert.py --models vicuna-7b [vicuna-13b] --folder SCRATCH --out benchmarks/results/convert.json

Builds the language model's Hugging Face folder with random bfloat16 weights (13.5 GB and 26 GB), copies it, converts
it, restores the result onto a mesh of eight CPU devices one parameter at a time and compares 1,000 random slices with
the source; every folder is removed again. Each step is a process of its own, of which the anonymous memory (`Anonymous`
in /proc/PID/smaps_rollup: what is not a file's page) is sampled twenty times a second. Copy and conversion both end
with their bytes on the disk (fsync).

`--source` chooses the format that is converted: `safetensors`, `bin` (PyTorch's), `meta` (two tensor-parallel shards)
or `delta` (a base and a Vicuna delta); `--layers` makes a model of the same width and fewer layers. Free disk that is
needed: twice the model, three times for a delta.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

HERE = Path(__file__).resolve().parent
# This file has the name of the package that it measures, and Python looks beside a script first. So the folder leaves
# the path here; and a neighbour that asks for the package, and gets this file, gets the package after all.
path_before = list(sys.path)
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
if __name__ == "convert":
    del sys.modules["convert"]
    importlib.import_module("convert")
    sys.path[:] = path_before

SHARD_BYTES = 5_000_000_000
SLICES = 1_000
DEVICES = 8
SOURCES = ("safetensors", "bin", "meta", "delta")
Result = dict[str, Any]


def random_tensor(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal bfloat16 numbers of the size that trained weights have; a block of them is repeated."""
    size = int(np.prod(shape))
    block = np.random.default_rng(seed).normal(scale=0.02, size=min(size, 1 << 22))
    flat = np.resize(block.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16), size)
    return flat.view(ml_dtypes.bfloat16).reshape(shape)


def hf_shapes(llama: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of `LlamaForCausalLM`, in the order of its layers."""
    width, mlp = llama.width, llama.mlp_width
    q, kv = llama.num_heads * llama.head_dim, llama.num_kv_heads * llama.head_dim
    yield "model.embed_tokens.weight", (llama.vocab_size, width)
    for i in range(llama.num_layers):
        at = f"model.layers.{i}"
        yield f"{at}.input_layernorm.weight", (width,)
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield f"{at}.self_attn.{name}.weight", (rows, width)
        yield f"{at}.self_attn.o_proj.weight", (width, q)
        yield f"{at}.post_attention_layernorm.weight", (width,)
        yield f"{at}.mlp.gate_proj.weight", (mlp, width)
        yield f"{at}.mlp.up_proj.weight", (mlp, width)
        yield f"{at}.mlp.down_proj.weight", (width, mlp)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (llama.vocab_size, width)


def build(folder: Path, llama: Any) -> None:
    """A Hugging Face folder in shards, with its index and its config."""
    from convert.safetensors_writer import write_safetensors

    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, shape in hf_shapes(llama):
        size = 2 * int(np.prod(shape))
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        room -= size
        shards[-1].append((name, shape))
    index, number = {}, 0
    for at, shard in enumerate(shards, start=1):
        file = f"model-{at:05d}-of-{len(shards):05d}.safetensors"
        entries = []
        for name, shape in shard:
            number += 1
            norm = name.endswith("norm.weight")

            def values(shape: Any = shape, seed: int = number, norm: bool = norm) -> np.ndarray:
                return np.ones(shape, ml_dtypes.bfloat16) if norm else random_tensor(shape, seed)

            entries.append((name, shape, ml_dtypes.bfloat16, values))
            index[name] = file
        write_safetensors(folder / file, entries)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama", "hidden_act": "silu", "vocab_size": llama.vocab_size,
        "hidden_size": llama.width, "intermediate_size": llama.mlp_width,
        "num_hidden_layers": llama.num_layers, "num_attention_heads": llama.num_heads,
        "num_key_value_heads": llama.num_kv_heads, "rms_norm_eps": llama.norm_eps,
        "rope_theta": llama.rope_base, "max_position_embeddings": llama.max_positions,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_delta(folder: Path) -> None:
    """Makes a copy of a model into a delta: its norms become small, its kernels stay what is to be added."""
    from convert.safetensors_writer import write_safetensors
    from convert.sources import SafetensorsSource

    for file in sorted(folder.glob("*.safetensors")):
        source = SafetensorsSource(file)
        entries = []
        for name in source.names():

            def values(name: str = name, source: Any = source) -> np.ndarray:
                tensor = np.asarray(source.get(name))
                return tensor * np.asarray(0.01, tensor.dtype) if "norm" in name else tensor

            entries.append((name, source.shape(name), source.dtype(name), values))
        write_safetensors(file, entries)


def rewrite(folder: Path, kind: str) -> None:
    """Turns the shards of a Hugging Face folder into PyTorch's, or into two of Meta's with their params.json."""
    from convert.pth import write_pth
    from convert.sources import SafetensorsSource

    if kind == "bin":
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for file in sorted(folder.glob("*.safetensors")):
            source = SafetensorsSource(file)
            write_pth(file.with_suffix(".bin"), {name: source.get(name) for name in source.names()})
            file.unlink()
        weight_map = {name: file.replace(".safetensors", ".bin") for name, file in index.items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "model.safetensors.index.json").unlink()
        return
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    source = SafetensorsSource(folder)
    for part in range(2):
        tensors = {}
        for name in source.names():
            theirs, axis = meta_name(name)
            value = np.asarray(source.get(name))
            if theirs.endswith(("wq.weight", "wk.weight")):  # rotary pairs are neighbours there
                rows, width = value.shape
                value = value.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2)
                value = value.reshape(rows, width)
            tensors[theirs] = value if axis is None else np.split(value, 2, axis)[part]
        write_pth(folder / f"consolidated.{part:02d}.pth", tensors)
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": heads,
        "multiple_of": 256, "norm_eps": config["rms_norm_eps"], "vocab_size": -1,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    for file in (
        *folder.glob("*.safetensors"),
        *folder.glob("*.index.json"),
        folder / "config.json",
    ):
        file.unlink()


def meta_name(name: str) -> tuple[str, int | None]:
    """What Meta calls a tensor, and the axis that its tensor-parallel shards are parts of."""
    names: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
        "model.norm.weight": ("norm.weight", None),
        "lm_head.weight": ("output.weight", 0),
        "self_attn.q_proj": ("attention.wq", 0),
        "self_attn.k_proj": ("attention.wk", 0),
        "self_attn.v_proj": ("attention.wv", 0),
        "self_attn.o_proj": ("attention.wo", 1),
        "mlp.gate_proj": ("feed_forward.w1", 0),
        "mlp.down_proj": ("feed_forward.w2", 1),
        "mlp.up_proj": ("feed_forward.w3", 0),
        "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
    }
    if name in names:
        return names[name]
    _, _, layer, rest = name.split(".", 3)
    theirs, axis = names[rest.removesuffix(".weight")]
    return f"layers.{layer}.{theirs}.weight", axis


def convert(source: Path, delta: Path | None, out: Path, preset: Any) -> None:
    """The language model of a preset, as the command converts it."""
    from convert.llama_files import open_llama
    from convert.model import write_model
    from convert.parts import llama_plan

    opened = open_llama(source, delta=delta, max_positions=preset.model.llama.max_positions)
    write_model(
        out, {"llama": llama_plan(opened, preset.model)}, preset=preset,
        tokenizer=lambda folder: None, facts={}, settings={}, progress=lambda *_: None,
    )  # fmt: skip


def copy(source: Path, out: Path) -> None:
    """The same bytes, read and written once, and on the disk when it returns."""
    out.mkdir()
    for file in sorted(source.iterdir()):
        with file.open("rb") as read, (out / file.name).open("wb") as written:
            shutil.copyfileobj(read, written, 16 << 20)
            written.flush()
            os.fsync(written.fileno())


def restore(source: Path, delta: Path | None, out: Path, preset: Any) -> None:
    """Every layer onto eight devices, and random slices against the source."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    from convert.llama_files import open_llama
    from convert.parts import llama_plan
    from minigpt4_jax.model_folder import ModelFolder, file_of
    from minigpt4_jax.models.minigpt4 import abstract_params
    from minigpt4_jax.sharding import make_mesh, make_shardings

    model = preset.model
    folder = ModelFolder(out)
    opened = open_llama(source, delta=delta, max_positions=model.llama.max_positions)
    plan = llama_plan(opened, model)
    mesh = make_mesh(fsdp=2, tensor=4)
    llama = {"llama": abstract_params(model)["llama"]}
    shardings = make_shardings(mesh, llama)
    from minigpt4_jax.checkpoint import leaf_names

    places, leaves = leaf_names(shardings), leaf_names(llama)
    if set(folder.names()) != set(leaves):
        raise SystemExit("The folder does not hold the language model's parameters.")
    rng = np.random.default_rng(0)
    steps = {step.path: step for step in plan.steps}
    chosen = rng.choice(sorted(leaves), SLICES)
    groups: dict[str, list[str]] = {}
    for name in leaves:
        groups.setdefault(file_of(name), []).append(name)
    compared = 0
    for names in groups.values():
        for name in names:
            array = folder.place(name, places[name])
            times = int((chosen == name).sum())
            if not times:
                continue
            expected, problems = plan.make(steps[name])
            if problems or expected is None:
                raise SystemExit(f"{name}: {problems}")
            for shard in rng.choice(array.addressable_shards, times):
                part = np.asarray(shard.data)
                at = tuple(
                    slice(a, a + 1 + int(rng.integers(8))) for a in rng.integers(0, part.shape)
                )
                if not np.array_equal(part[at], expected[shard.index][at]):
                    raise SystemExit(f"{name} {shard.index} {at} differs from the source.")
                compared += 1
    if compared != SLICES:
        raise SystemExit(f"{compared} slices were compared, not {SLICES}.")


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(what: str, call: Callable[..., None], *arguments: Any) -> Result:
    """Runs `call` in a process of its own; seconds and peak anonymous memory."""
    process = multiprocessing.get_context("spawn").Process(target=call, args=arguments)
    start = time.perf_counter()
    process.start()
    samples: list[int] = [0]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            samples.append(anonymous_bytes(process.pid))

    watcher = threading.Thread(target=sample)
    watcher.start()
    process.join()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.exitcode:
        raise SystemExit(f"{what} failed (exit code {process.exitcode}).")
    result = {"seconds": round(seconds, 1), "peak_anonymous_gb": round(max(samples) / 1e9, 2)}
    print(
        f"{what:28} {result['seconds']:8.1f} s  {result['peak_anonymous_gb']:6.2f} GB", flush=True
    )
    return result


def anonymous_bytes(pid: int | None) -> int:
    """`Anonymous` of a process; 0 where it has none or is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    found = [line for line in text.splitlines() if line.startswith("Anonymous:")]
    return 1024 * int(found[0].split()[1]) if found else 0


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def run(name: str, kind: str, layers: int | None, scratch: Path, rounds: int) -> Result:
    """One model: build, copy and convert in turns, restore."""
    from minigpt4_jax.presets import get_preset

    preset = get_preset(name)
    if layers is not None:
        llama = dataclasses.replace(preset.model.llama, num_layers=layers)
        preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, llama=llama))
    llama = preset.model.llama
    label = f"{name}, {kind}"
    source, delta, out = scratch / "source", None, scratch / "out"
    result: Result = {
        "layers": llama.num_layers,
        "build": measure(f"{label}: build", build, source, llama),
    }
    if kind == "delta":
        delta = scratch / "delta"
        shutil.copytree(source, delta)
        measure(f"{label}: the delta", make_delta, delta)
    elif kind != "safetensors":
        measure(f"{label}: to {kind}", rewrite, source, kind)
    result["bytes"] = folder_bytes(source)
    copies, conversions = [], []
    for number in range(rounds):
        copied = measure(f"{label}: copy", copy, source, scratch / "copy")
        shutil.rmtree(scratch / "copy")
        converted = measure(f"{label}: convert", convert, source, delta, out, preset)
        copies.append(copied)
        conversions.append(converted)
        if number + 1 < rounds:
            shutil.rmtree(out)
    result["restore"] = measure(f"{label}: restore", restore, source, delta, out, preset)
    for folder in (out, source, *([delta] if delta else [])):
        shutil.rmtree(folder)
    result |= {"copy": copies, "convert": conversions, "slices_compared": SLICES}
    times = [
        statistics.median(step["seconds"] for step in steps) for steps in (conversions, copies)
    ]
    result["ratio_to_copy"] = round(times[0] / times[1], 2)
    print(f"{label}: {result['ratio_to_copy']} times a plain copy", flush=True)
    return result


def main() -> None:
    """Runs the benchmark; prints the steps and writes the JSON after every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["vicuna-7b"], metavar="PRESET")
    parser.add_argument("--folder", type=Path, required=True, help="scratch space")
    parser.add_argument("--source", choices=SOURCES, default="safetensors")
    parser.add_argument("--layers", type=int, metavar="L", help="default: as many as the model has")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    result: Result = {"hardware": {}, "models": {}}
    if args.out and args.out.exists():  # other models and formats stay
        result = json.loads(args.out.read_text())
    result["hardware"] = {"cores": os.cpu_count(), "python": platform.python_version()}
    for name in args.models:
        label = f"{name}, {args.source}"
        result["models"][label] = run(name, args.source, args.layers, args.folder, args.rounds)
        if args.out:
            beside = args.out.with_suffix(".tmp")
            beside.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(beside, args.out)


if __name__ == "__main__":
    main()
