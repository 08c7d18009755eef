"""The published files as `transformers` computes them: the other side of `verify --against-torch`.

For: `see_with_torch` and `read_with_torch`, which read the sources with torch itself under names written down here a
second time, and never ask the tables of this folder: a mistake in a table would otherwise be on both sides.
Not for: comparing (`against_torch.py`), training, speed.

Sizes and eps come from the preset and from the sources' own config.json, not from the converted folder. Differs from
the original's code, which is not needed: `Blip2VisionModel` and `Blip2QFormerModel` are the same towers, once the eps
of the norm behind the image tower is set to that of `ln_vision` (transformers takes that of the blocks).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.settings import ConvertConfig
from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig, QFormerConfig, UserError, VitConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Stages = dict[str, np.ndarray]
"""What a side computed, float32, by the name of the stage; a stage of several layers has them in front."""

TOWER, LN_VISION, QFORMER, PROJECTION = "image tower", "ln_vision", "Q-Former", "projection"
EMBEDDED, LOGITS = "prompt embedding", "logits"

EVA = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"vision_model\.", ""),  # the tower inside Hugging Face's BLIP-2
)
BLIP2 = (
    (r"ln_vision\.", "post_layernorm."),
    (r"vision_model\.post_layernorm\.", "post_layernorm."),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"Qformer\.bert\.encoder\.(.*)attention\.self\.", r"qformer.encoder.\1attention.attention."),
    (r"Qformer\.bert\.", "qformer."),
    (r"qformer\.embeddings\.layernorm\.", "qformer.layernorm."),  # InstructBLIP
)


def see_with_torch(settings: ConvertConfig, model: ModelConfig, pixels: np.ndarray) -> Stages:
    """Image tower, `ln_vision`, Q-Former and projection of one picture, `pixels` `[1, H, W, 3]`.

    Raises:
        UserError: torch or transformers is missing, or a source has not the tensors that the modules ask for.
    """
    torch, transformers = _oracle()
    behind = _read(Path(settings.qformer)) if model.qformer else {}
    named = _renamed(behind, BLIP2)
    width = model.vit.width
    plain = {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
    norm = {n: named[n] for n in plain if n in named} if model.qformer else plain
    tower = _renamed(_read(Path(settings.vit)), EVA)
    vision = transformers.Blip2VisionModel(_vision_config(model.vit))
    _fill(vision, _tower(tower, model.vit) | norm, settings.vit)
    vision.post_layernorm.eps = model.ln_vision_eps
    found = {}
    with torch.no_grad():
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        seen = vision(pixel_values=images, output_hidden_states=True)
        found[TOWER] = torch.stack(seen.hidden_states[1:])
        found[LN_VISION] = features = seen.last_hidden_state
        del vision, tower
        if model.qformer is not None:
            queries = transformers.Blip2QFormerModel(_qformer_config(model.qformer, width))
            _fill(queries, _under("qformer.", named), settings.qformer)
            features = queries(
                query_embeds=named["query_tokens"].float(), encoder_hidden_states=features
            ).last_hidden_state
            found[QFORMER] = features
        else:
            features = features[:, 1:].reshape(1, -1, model.projection_in)
        projection = _read(Path(settings.projection))
        found[PROJECTION] = torch.nn.functional.linear(
            features,
            projection["llama_proj.weight"].float(),
            projection["llama_proj.bias"].float(),
        )
    return {name: x.numpy() for name, x in found.items()}


def read_with_torch(
    settings: ConvertConfig,
    ids: list[int],
    picture: np.ndarray,
    *,
    layers: Mapping[str, int],
    new_tokens: int,
) -> tuple[Stages, list[int]]:
    """The language model on a prompt and its own greedy answer.

    Args:
        ids: the prompt, with `IMAGE_TOKEN_ID` at the places of `picture`'s rows.
        picture: `[1, T, D]`, as the projection gave it.
        layers: name of a stage -> the layer whose output it is.
        new_tokens: how many of the likeliest tokens follow, none of which ends the answer.

    Returns:
        The stages over prompt and answer (but for its last token), and the answer's ids.

    Raises:
        UserError: as `see_with_torch`; or the language model is in a form that transformers does not read.
    """
    torch, _ = _oracle()
    model = _language_model(settings)
    kept: dict[str, list[Any]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            kept[name].append(out[0] if isinstance(out, tuple) else out)

        return hook

    for name, number in layers.items():
        model.model.layers[number].register_forward_hook(keep(name))
    with torch.no_grad():
        prompt = torch.tensor([ids])
        embeds = model.get_input_embeddings()(prompt.clamp(min=0))
        embeds[prompt == IMAGE_TOKEN_ID] = torch.from_numpy(picture)[0]
        embedded, logits, answer = [embeds], [], []
        out = model(inputs_embeds=embeds, use_cache=True)
        for _ in range(new_tokens):
            logits.append(out.logits)
            answer.append(int(out.logits[0, -1].argmax()))
            if len(answer) == new_tokens:
                break
            token = torch.tensor([[answer[-1]]])
            embedded.append(model.get_input_embeddings()(token))
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    found = {EMBEDDED: embedded, **kept, LOGITS: logits}
    return {name: torch.cat(parts, dim=1).numpy() for name, parts in found.items()}, answer


def _oracle() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--against-torch needs torch and transformers ({error}); install them with `pip install "
            "'minigpt4-jax[parity]'`."
        ) from error
    library: Any = transformers  # parts of it are untyped
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return torch, library


# --- sources ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files of a Hugging Face folder; mapped where the format can be."""
    import torch
    from safetensors.torch import load_file

    if path.is_dir():
        return {name: x for file in _weight_files(path) for name, x in _read(file).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the older format cannot be mapped
        value = torch.load(path, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = value["model"] if isinstance(value.get("model"), dict) else value
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for ending in (".safetensors", ".bin"):
        for index in sorted(folder.glob(f"*{ending}.index.json")):
            names = json.loads(index.read_text())["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
        files = sorted(folder.glob(f"*{ending}"))
        if files:
            return files
    raise UserError(
        f"{folder} has no .safetensors and no .bin, which is what --against-torch reads. Give a Hugging Face folder."
    )


def _renamed(
    tensors: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    """The tensors under the first name that fits; others keep theirs."""
    found = {}
    for name, x in tensors.items():
        matches = ((re.compile(p).match(name), p, new) for p, new in names)
        hit = next((re.sub(p, new, name, count=1) for match, p, new in matches if match), name)
        found[hit] = x
    return found


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def _fill(module: Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Every parameter of `module` by its name, as float32."""
    import torch

    wanted = dict(module.named_parameters())
    _require(wanted, tensors, where)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name].reshape(parameter.shape))
    module.eval()


def _require(wanted: Iterable[str], held: Iterable[str], where: str) -> None:
    missing = sorted({*wanted} - {*held})
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} tensors that transformers' module asks for: {', '.join(missing[:6])}. "
            f"`python -m convert inspect {where}` says what it is."
        )


def _tower(tensors: Mapping[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
    """What `_renamed` gave, with the joined bias of q, k (which has none in EVA) and v, and positions for the grid."""
    import torch

    found = dict(tensors)
    for name, q_bias in tensors.items():
        match = re.fullmatch(r"blocks\.(\d+)\.attn\.q_bias", name)
        if match:
            v_bias = tensors[name.replace("q_bias", "v_bias")]
            joined = torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
            found[f"encoder.layers.{match[1]}.self_attn.qkv.bias"] = joined
    name = "embeddings.position_embedding"
    if name in found and found[name].shape[1] != config.num_patches + 1:
        first, rest = found[name].float()[:, :1], found[name].float()[:, 1:]
        side = round(rest.shape[1] ** 0.5)
        square = rest.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            square, size=(config.grid, config.grid), mode="bicubic", align_corners=False
        )
        found[name] = torch.cat([first, resized.flatten(2).transpose(1, 2)], dim=1)
    return found


# --- modules ----------------------------------------------------------------------------------------------------------


def _vision_config(vit: VitConfig) -> Any:
    return _oracle()[1].Blip2VisionConfig(
        hidden_size=vit.width,
        intermediate_size=vit.mlp_width,
        num_hidden_layers=vit.num_layers,
        num_attention_heads=vit.num_heads,
        image_size=vit.image_size,
        patch_size=vit.patch_size,
        layer_norm_eps=vit.norm_eps,
        hidden_act="gelu",
        attn_implementation="eager",
    )


def _qformer_config(qformer: QFormerConfig, image_width: int) -> Any:
    return _oracle()[1].Blip2QFormerConfig(
        hidden_size=qformer.width,
        intermediate_size=qformer.mlp_width,
        num_hidden_layers=qformer.num_layers,
        num_attention_heads=qformer.num_heads,
        cross_attention_frequency=qformer.cross_attention_every,
        encoder_hidden_size=image_width,
        layer_norm_eps=qformer.norm_eps,
        hidden_act="gelu",
        attn_implementation="eager",
    )


def _language_model(settings: ConvertConfig) -> Any:
    """`LlamaForCausalLM` in float32, from the language model's own files."""
    torch, transformers = _oracle()
    path = Path(settings.llm)
    if not path.is_dir():
        place, extra = path.parent, {"gguf_file": path.name}
    elif (path / "config.json").exists():
        place, extra = path, {}
    else:
        raise UserError(
            f"The language model {path} is in Meta's form, which transformers does not read, so --against-torch has "
            "nothing to compare with. Give the same model as a Hugging Face folder with --llm (transformers' "
            "convert_llama_weights_to_hf makes one); what verify compares bit for bit does not change."
        )
    if settings.delta:
        return _summed(path, Path(settings.delta))
    try:
        model, said = transformers.LlamaForCausalLM.from_pretrained(
            place,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **extra,
        )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"transformers cannot load the language model {path} ({error}).") from error
    _require(said["missing_keys"], (), str(path))
    return model.eval()


def _summed(base: Path, delta: Path) -> Any:
    """Base and delta added by torch, in the dtype that it gives the sum; a row that only the delta has is its own."""
    torch, transformers = _oracle()
    config = transformers.LlamaConfig.from_pretrained(delta)
    ours, theirs = _read(base), _read(delta)
    config.vocab_size = len(theirs["model.embed_tokens.weight"])
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config)
    wanted = dict(model.named_parameters())  # a tied head is not in it
    _require(wanted, ours, str(base))
    _require(wanted, theirs, str(delta))
    with torch.no_grad():
        for name, parameter in wanted.items():
            x, y = ours[name], theirs[name]
            zeros = x.new_zeros(len(y) - len(x), *x.shape[1:])
            parameter.copy_(torch.cat([x, zeros]) + y)
    return model.eval()
