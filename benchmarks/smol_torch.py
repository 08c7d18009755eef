"""The PyTorch side of `train_cpu.py` and `inference_cpu.py`: `transformers` models with the weights of the smol preset.

For: the twins that the benchmark times, as a user of `transformers` would run them: float32, eval, sdpa, inference
mode. Not for: tests (`tests/parity`), which read the weights by the other libraries' own loaders. Needs the `parity`
extra.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from measuring import until_stop

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.models.minigpt4 import Params
from minigpt4_jax.train_config import OptimizerConfig

COMPILED = "static, compiled"
"""The static cache, and steps through `torch.compile`; needs a C++ compiler on a CPU."""
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


def use_threads(count: int) -> None:
    """Threads of every operation of torch."""
    torch.set_num_threads(count)
    warnings.filterwarnings("ignore", module="transformers|torch")


def _load(module: torch.nn.Module, arrays: dict[str, np.ndarray], *, absent: Sequence[str]) -> None:
    """Binds arrays to a module by name; exactly the names in `absent` may be missing, none may be extra."""
    state = {name: torch.tensor(a) for name, a in arrays.items()}
    found = module.load_state_dict(state, strict=False)
    if set(found.missing_keys) != set(absent) or found.unexpected_keys:
        raise SystemExit(
            f"The parameters do not fit the twin of transformers {transformers.__version__}: {found}; expected missing "
            f"{list(absent)} and nothing unexpected."
        )


def _linear(tree: Params, name: str) -> dict[str, np.ndarray]:
    """`name` with a dot at its end, or nothing for a module of its own."""
    arrays = {f"{name}weight": np.asarray(tree["kernel"]).T}
    return arrays | ({f"{name}bias": np.asarray(tree["bias"])} if "bias" in tree else {})


def _norm(tree: Params, name: str) -> dict[str, np.ndarray]:
    arrays = {f"{name}.weight": np.asarray(tree["scale"])}
    return arrays | ({f"{name}.bias": np.asarray(tree["bias"])} if "bias" in tree else {})


class ImageTwin:
    """`Dinov2Model`, then the groups of patches through one `Linear`.

    The layer scales are folded into the weights that both sides share, and the key's bias is zero; the twin still
    multiplies by a scale of one and adds that bias, as `Dinov2Model` always does.
    """

    def __init__(self, params: Params, config: ModelConfig) -> None:
        vit = config.vit
        settings = transformers.Dinov2Config(
            hidden_size=vit.width, num_hidden_layers=vit.num_layers, num_attention_heads=vit.num_heads,
            mlp_ratio=vit.mlp_width // vit.width, image_size=vit.image_size, patch_size=vit.patch_size,
            layer_norm_eps=vit.norm_eps, layerscale_value=1.0, attn_implementation="sdpa",
        )  # fmt: skip
        if config.ln_vision_eps != vit.norm_eps:
            raise SystemExit("Dinov2Model has one eps for all its norms; the preset has two.")
        self.model = transformers.Dinov2Model(settings).eval()
        tree, embed = params["vit"], "embeddings.patch_embeddings.projection"
        arrays = {
            "embeddings.cls_token": np.asarray(tree["cls_token"]),
            "embeddings.position_embeddings": np.asarray(tree["pos_embed"]),
            f"{embed}.weight": np.asarray(tree["patch_embed"]["kernel"]).transpose(3, 2, 0, 1),
            f"{embed}.bias": np.asarray(tree["patch_embed"]["bias"]),
            **_norm(params["ln_vision"], "layernorm"),
        }
        absent = ["embeddings.mask_token"]
        for i, block in tree["blocks"].items():
            at = f"encoder.layer.{i}"
            for name in ("norm1", "norm2"):
                arrays |= _norm(block[name], f"{at}.{name}")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                arrays |= _linear(block["attn"][name], f"{at}.attention.{name}.")
            arrays[f"{at}.attention.k_proj.bias"] = np.zeros(vit.width, np.float32)
            for name in ("fc1", "fc2"):
                arrays |= _linear(block["mlp"][name], f"{at}.mlp.{name}.")
            absent += [f"{at}.layer_scale1.lambda1", f"{at}.layer_scale2.lambda1"]
        _load(self.model, arrays, absent=absent)
        self.project = torch.nn.Linear(config.projection_in, config.llama.width).eval()
        _load(self.project, _linear(params["llama_proj"], ""), absent=[])

    def encoder(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """A call that encodes `images` (`[I, H, W, 3]`, normalised), held in torch's own layout."""
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

        @torch.inference_mode()
        def encode() -> np.ndarray:
            patches = self.model(pixels).last_hidden_state[:, 1:]
            grouped = patches.reshape(len(patches), -1, self.project.in_features)
            return self.project(grouped).numpy()

        return encode


class LlamaTwin:
    """`LlamaForCausalLM` with its two kinds of cache, and the train step of the projection through it."""

    def __init__(self, params: Params, config: ModelConfig) -> None:
        self.config = config
        cfg = config.llama
        settings = transformers.LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.width, intermediate_size=cfg.mlp_width,
            num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads, head_dim=cfg.head_dim,
            num_key_value_heads=cfg.num_kv_heads, max_position_embeddings=cfg.max_positions,
            rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
            attn_implementation="sdpa",
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(settings).eval().requires_grad_(False)
        tree = params["llama"]
        arrays = {"model.embed_tokens.weight": np.asarray(tree["embed_tokens"]["embedding"])}
        arrays |= {"lm_head.weight": arrays["model.embed_tokens.weight"]}
        arrays |= _norm(tree["norm"], "model.norm")
        for i, layer in tree["layers"].items():
            at = f"model.layers.{i}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                arrays |= _norm(layer[name], f"{at}.{name}")
            for part in ("self_attn", "mlp"):
                for name, leaf in layer[part].items():
                    arrays |= _linear(leaf, f"{at}.{part}.{name}.")
        _load(self.model, arrays, absent=[])

    def _embed(self, ids: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        is_image = ids == IMAGE_TOKEN_ID
        embeds = self.model.get_input_embeddings()(ids.clamp(min=0))
        return embeds.masked_scatter(is_image[..., None], image_embeds)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], image_embeds: np.ndarray) -> np.ndarray:
        """Logits at every position, `[S, V]`, without a cache."""
        embeds = self._embed(torch.tensor([ids]), torch.tensor(image_embeds))
        return self.model(inputs_embeds=embeds, use_cache=False).logits[0].numpy()

    @torch.inference_mode()
    def first_tokens(
        self, prompts: Sequence[Sequence[int]], image_embeds: np.ndarray, *, cache: str, room: int
    ) -> tuple[list[int], Any]:
        """The likeliest first token of each answer, and the cache of the prompts.

        Args:
            prompts: of one length, so that nothing is padded.
            image_embeds: `[B, R, D]`.
            cache: `dynamic`, or one of the static ones, with exactly as many places as prompt and answer need.
            room: tokens of the answer.
        """
        ids = torch.tensor(prompts)
        past: Any
        if cache != "dynamic":
            places = ids.shape[1] + room
            past = transformers.StaticCache(config=self.model.config, max_cache_len=places)
        else:
            past = transformers.DynamicCache(config=self.model.config)
        output = self.model(
            inputs_embeds=self._embed(ids, torch.tensor(image_embeds)),
            past_key_values=past, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].argmax(-1).tolist(), past

    @functools.cached_property
    def _compiled(self) -> Any:
        """The model through `torch.compile`: a minute on the first call."""
        return torch.compile(self.model, dynamic=False)

    @torch.inference_mode()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: np.ndarray,
        *,
        cache: str,
        steps: int,
    ) -> float:
        """Seconds that `steps` greedy steps take behind the first two tokens of the answers.

        All tokens come to the host at every step, as they must to be shown. The prompt is never read by the compiled
        model: it has another shape.
        """
        tokens, past = self.first_tokens(prompts, image_embeds, cache=cache, room=steps + 2)
        model = self._compiled if cache == COMPILED else self.model
        start = 0.0
        for number in range(steps + 1):
            output = model(
                input_ids=torch.tensor(tokens)[:, None], past_key_values=past, use_cache=True
            )
            tokens = output.logits[:, -1].argmax(-1).tolist()
            start = start if number else time.perf_counter()
        return time.perf_counter() - start

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: np.ndarray,
        *,
        cache: str,
        max_new_tokens: int,
        stop_tokens: Collection[int],
    ) -> list[list[int]]:
        """`transformers`' own `generate`: greedy, left-padded, until every row has stopped. The stops are left out."""
        stops = sorted(stop_tokens)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts])
        counts = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        found = self.model.generate(
            inputs_embeds=self._embed(ids, torch.tensor(image_embeds)),
            attention_mask=counts,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            cache_implementation="static" if cache == "static" else None,
        )
        return [until_stop(row, stop_tokens) for row in found.tolist()]

    def train_step(
        self, projection: Params, batch: dict[str, np.ndarray], optimizer: OptimizerConfig
    ) -> Callable[[], float]:
        """A call that takes one AdamW step of the projection on `batch` (rows without padding); returns its loss."""
        project = torch.nn.Linear(self.config.projection_in, self.config.llama.width)
        _load(project, _linear(projection, ""), absent=[])
        groups = [
            {"params": [project.weight], "weight_decay": optimizer.weight_decay},
            {"params": [project.bias], "weight_decay": 0.0},
        ]
        betas = (optimizer.beta1, optimizer.beta2)
        adamw = torch.optim.AdamW(groups, lr=optimizer.init_lr, betas=betas, eps=optimizer.eps)
        on_device = {name: torch.from_numpy(array) for name, array in batch.items()}
        ids, patches = on_device["token_ids"].long(), on_device["features"]
        positions, targets = on_device["target_positions"].long(), on_device["target_ids"].long()
        rows = torch.arange(len(ids))[:, None]

        def step() -> float:
            image_embeds = project(patches.reshape(len(patches), -1, project.in_features))
            embeds = self._embed(ids, image_embeds)
            hidden = self.model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[rows, positions])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            adamw.zero_grad(set_to_none=True)
            loss.backward()
            adamw.step()
            return float(loss.detach())

        return step
