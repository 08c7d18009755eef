"""The PyTorch side of `smol.py`: `transformers` models with the weights of the smol preset.

For: the twins that the benchmark times, as a user of `transformers` would run them: float32, eval, sdpa, inference
mode. Not for: tests (`tests/parity`), which read the weights by the other libraries' own loaders. Needs the `parity`
extra.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig, OptimizerConfig
from minigpt4_jax.models.minigpt4 import Params

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

    def __init__(self, params: Params, config: ModelConfig, *, context: int) -> None:
        self.config, self._context = config, context
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

    def stream(self, ids: Sequence[int], image_embeds: np.ndarray, *, cache: str) -> Any:
        """Yields greedy tokens without end. `cache` is `dynamic` or `static` (as many slots as our engine has)."""
        prompt, rows = torch.tensor([ids]), torch.tensor(image_embeds)
        with torch.inference_mode():
            past: Any
            if cache == "static":
                past = transformers.StaticCache(
                    config=self.model.config, max_cache_len=self._context
                )
            else:
                past = transformers.DynamicCache(config=self.model.config)
            output = self.model(
                inputs_embeds=self._embed(prompt, rows), past_key_values=past, use_cache=True, logits_to_keep=1
            )  # fmt: skip
        while True:
            # A generator must not keep the mode over a yield: it would leak into the caller.
            with torch.inference_mode():
                token = output.logits[0, -1].argmax()
                chosen = int(token)
            yield chosen
            with torch.inference_mode():
                output = self.model(
                    input_ids=token.view(1, 1), past_key_values=past, use_cache=True
                )

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
