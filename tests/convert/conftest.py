"""Tiny weight files, written on the spot, with the names and layouts of the real ones.

The builders are written from the formats' side and know nothing of the tables under test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from minigpt4_jax.config import LlamaConfig, VitConfig
from minigpt4_jax.presets import PRESETS

Arrays = dict[str, np.ndarray]

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a t", "Ġ c", "Ġc at", "1 2", "Ġ 1"]


@pytest.fixture
def vit() -> VitConfig:
    return PRESETS["tiny"].model.vit


@pytest.fixture
def llama() -> LlamaConfig:
    return PRESETS["tiny"].model.llama


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, as GPT-2 defines them."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    letters = {byte: chr(byte) for byte in kept}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(moved)}
    return [letters[byte] for byte in range(256)]


@pytest.fixture(scope="session")
def gguf_vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their types: 3 control tokens, 256 bytes, the merged pieces, fillers up to the tiny vocabulary."""
    tokens = [*CONTROL, *_byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    tokens += [f"filler{i}" for i in range(PRESETS["tiny"].model.llama.vocab_size - len(tokens))]
    return tokens, [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL))


@pytest.fixture
def gguf_arrays(llama: LlamaConfig) -> Arrays:
    """What llama.cpp stores for a model of this config: `[out, in]`, float32, tied head."""
    rng = np.random.default_rng(1)
    width, queries = llama.width, llama.num_heads * llama.head_dim
    keys = llama.num_kv_heads * llama.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (llama.vocab_size, width),
        "output_norm.weight": (width,),
    }
    for i in range(llama.num_layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.attn_q.weight": (queries, width),
            f"blk.{i}.attn_k.weight": (keys, width),
            f"blk.{i}.attn_v.weight": (keys, width),
            f"blk.{i}.attn_output.weight": (width, queries),
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate.weight": (llama.mlp_width, width),
            f"blk.{i}.ffn_up.weight": (llama.mlp_width, width),
            f"blk.{i}.ffn_down.weight": (width, llama.mlp_width),
        }
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


@pytest.fixture
def write_gguf(
    llama: LlamaConfig, gguf_vocabulary: tuple[list[str], list[int]]
) -> Callable[[Path, Arrays], Path]:
    """Writes a GGUF file of the tiny llama with a tokenizer; matrices named in `quantized` as Q8_0."""

    def write(path: Path, arrays: Arrays, quantized: tuple[str, ...] = ()) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(llama.num_layers)
        writer.add_context_length(llama.max_positions)
        writer.add_embedding_length(llama.width)
        writer.add_feed_forward_length(llama.mlp_width)
        writer.add_head_count(llama.num_heads)
        writer.add_head_count_kv(llama.num_kv_heads)
        writer.add_rope_dimension_count(llama.head_dim)
        writer.add_rope_freq_base(llama.rope_base)
        writer.add_layer_norm_rms_eps(llama.norm_eps)
        tokens, types = gguf_vocabulary
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_unk_token_id(0)
        for name, array in arrays.items():
            if name in quantized:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def dino_arrays(vit: VitConfig) -> Arrays:
    """The backbone's tensors under the names that `OnnxSource` gives them; kernels `[in, out]`, a 6 x 6 grid."""
    rng = np.random.default_rng(2)
    d, patch = vit.width, "backbone.embeddings.patch_embeddings.projection"
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.cls_token": (1, 1, d),
        "/backbone/embeddings/Concat_6": (1, 1, d),
        "/backbone/embeddings/Reshape_1": (1, 36, d),
        f"{patch}.weight": (d, 3, vit.patch_size, vit.patch_size),
        f"{patch}.bias": (d,),
        "backbone.layernorm.weight": (d,),
        "backbone.layernorm.bias": (d,),
        "decoder.final_conv.weight": (1, 4, 1, 1),
    }
    for i in range(vit.num_layers):
        name, node = f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}"
        shapes |= {f"{name}.{n}.{x}": (d,) for n in ("norm1", "norm2") for x in ("weight", "bias")}
        for x in ("query", "key", "value"):
            shapes[f"{node}/attention/attention/{x}/MatMul"] = (d, d)
            shapes[f"{name}.attention.attention.{x}.bias"] = (d,)
        shapes |= {
            f"{node}/attention/output/dense/MatMul": (d, d),
            f"{name}.attention.output.dense.bias": (d,),
            f"{node}/mlp/fc1/MatMul": (d, vit.mlp_width),
            f"{name}.mlp.fc1.bias": (vit.mlp_width,),
            f"{node}/mlp/fc2/MatMul": (vit.mlp_width, d),
            f"{name}.mlp.fc2.bias": (d,),
            f"{name}.layer_scale1.lambda1": (d,),
            f"{name}.layer_scale2.lambda1": (d,),
        }
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


@pytest.fixture
def write_onnx() -> Callable[[Path, Arrays], Path]:
    """Writes an ONNX graph of one node per tensor. A name that starts with "/" becomes a node with that path, whose
    tensor carries a number for a name, as exporters do."""

    def write(path: Path, arrays: Arrays) -> Path:
        nodes, initializers = [], []
        for i, (name, array) in enumerate(arrays.items()):
            anonymous = name.startswith("/")
            kind = name.rsplit("/", 1)[-1].split("_")[0] if anonymous else "Add"
            tensor = f"onnx::{kind}_{1900 + i}" if anonymous else name
            node = name if anonymous else f"/use/{i}"
            initializers.append(numpy_helper.from_array(array, tensor))
            nodes.append(helper.make_node(kind, ["x", tensor], [f"y{i}"], name=node))
        graph = helper.make_graph(nodes, "tiny", [], [], initializers)
        onnx.save(helper.make_model(graph), path)
        return path

    return write
