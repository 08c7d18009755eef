"""The optimiser against the original's: learning rates, weight decay, accumulation, and whole training runs.

The original's settings become `OptimizerConfig` by their names (`optimizer_config`), so the map from its YAML is under
test as well. Runs are repeated in full, behind the Q-Former and of MiniGPT-v2, whose LoRA is added to the weights: both
are trained with this project's optimizer. Tolerances are those of the sets' README.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.projection import read_projection
from convert.pth_files import open_pth
from convert.sources import open_source
from minigpt4_jax.data import batches
from minigpt4_jax.data.prompts import encode_pieces, end_symbol_pieces
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import apply_method, make_model
from minigpt4_jax.train_config import OptimizerConfig
from minigpt4_jax.training.optimizer import decays_weight, make_optimizer, make_schedule
from minigpt4_jax.training.state import TrainBatch
from minigpt4_jax.training.step import loss_fn

PLACEHOLDER = "<ImageHere>"
LOSS, WEIGHTS = 5e-4, 1e-4
TINY_LOSS, TINY_WEIGHTS = 5e-5, 5e-7
"""For runs whose weights move by less than `TINY` in all."""
TINY = 1e-5


def optimizer_config(run: dict[str, Any], *, epoch: int | None = None) -> OptimizerConfig:
    """The original's `run:` section as ours. `epoch`: steps of an epoch where the section does not say."""
    steps = run.get("iters_per_epoch", epoch)
    decay = run.get("lr_decay_rate", run.get("decay_rate"))
    default = "linear_warmup_cosine_lr" if decay is None else "linear_warmup_step_lr"
    rates = ("init_lr", "min_lr", "warmup_lr")
    return OptimizerConfig(
        lr_sched=run.get("lr_sched", default),
        **{name: float(run[name]) for name in rates},
        warmup_steps=run["warmup_steps"],
        iters_per_epoch=steps,
        max_steps=steps * run.get("max_epoch", 1),
        lr_decay_rate=1.0 if decay is None else float(decay),
        weight_decay=float(run.get("weight_decay", 0)),
        beta2=float(run.get("beta2", 0.999)),
        accum_grad_iters=run.get("accum_grad_iters", 1),
        accum_grads="sum",
    )


def test_golden_learning_rates(golden: Any, schedule_case: str) -> None:
    settings = golden.report("optim/lr_schedule.json")["configs"][schedule_case]
    held = golden.arrays("optim/lr_schedule.npz")
    rates = held[f"{schedule_case}__lr"]
    assert len(rates)
    if f"{schedule_case}__step" in held:
        steps, epoch = held[f"{schedule_case}__step"], None
    else:
        epochs, within = held[f"{schedule_case}__epoch_iter"].T
        epoch = int(within.max()) + 1
        steps = epochs * epoch + within
    schedule = make_schedule(optimizer_config(settings, epoch=epoch))
    np.testing.assert_allclose(schedule(steps), rates, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.asarray(steps)), rates, rtol=1e-6)


# --- weight decay ---


def trained_shape(golden: Any, name: str) -> tuple[int, ...]:
    """Shape of a parameter, by its name in the whole model of the original, from the set's files."""
    if name.startswith("visual_encoder."):
        part = name.removeprefix("visual_encoder.")
        return open_source(golden.folder / "eva_vit" / "eva_vit.pth").shape(part)
    if name.startswith("llama_proj."):
        return open_source(golden.folder / "minigpt4_noqf" / "proj.pth").shape(name)
    if "lora_" in name:
        for file in sorted((golden.folder / "optim").glob("traj_*.npz")):
            with np.load(file) as held:
                if f"init__{name}" in held.files:
                    return held[f"init__{name}"].shape
    return open_source(golden.folder / "qformer" / "blip2_qformer.pth").shape(name)


def test_golden_weight_decay_groups(golden: Any, group_case: str) -> None:
    facts = golden.report("optim/param_groups.json")[group_case]
    decayed, spared = facts["weight_decay"], facts["no_weight_decay"]
    tree = {
        name: jax.ShapeDtypeStruct(trained_shape(golden, name), jnp.float32)
        for name in [*decayed, *spared]
    }
    assert len(tree) == len(decayed) + len(spared) > 0
    assert {name for name, decays in decays_weight(tree).items() if decays} == set(decayed)
    (beta1, beta2), ours = facts["betas"], OptimizerConfig()
    assert (ours.beta1, ours.eps, facts["amsgrad"]) == (beta1, facts["eps"], False)
    assert facts["decay_values"] == [ours.weight_decay, 0]
    assert dataclasses.replace(ours, beta2=beta2).beta2 == beta2


# --- runs ---


class Run:
    """A training run of the original."""

    def __init__(self, golden: Any, name: str) -> None:
        self.facts = golden.report("optim/trajectories.json")[name]
        self.held = golden.arrays(f"optim/traj_{name}.npz")
        self.config = optimizer_config(self.facts["run_cfg"])

    def weights(self, when: str) -> dict[str, np.ndarray]:
        """By the original's names and in its layout: `init`, `after_first_update` or `final`."""
        return {
            name.removeprefix(f"{when}__"): value
            for name, value in self.held.items()
            if name.startswith(f"{when}__")
        }

    @property
    def is_tiny(self) -> bool:
        start = self.weights("init")
        return all(np.abs(w - start[n]).max() < TINY for n, w in self.weights("final").items())

    def require_weights(self, found: dict[str, Any], when: str) -> None:
        expected = self.weights(when)
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(
                found[name],
                value,
                rtol=0,
                atol=TINY_WEIGHTS if self.is_tiny else WEIGHTS,
                err_msg=name,
            )


def test_golden_rates_and_updates_of_a_run(golden: Any, run_case: str) -> None:
    run = Run(golden, run_case)
    steps = np.arange(len(run.held["lr_used"]))
    np.testing.assert_allclose(make_schedule(run.config)(steps), run.held["lr_used"], rtol=1e-9)
    tx = make_optimizer(run.config)
    params = {"kernel": jnp.zeros((2, 2))}
    state, closed = tx.init(params), []
    update = jax.jit(
        lambda state: tx.update({"kernel": jnp.ones((2, 2))}, state, params, num_targets=1)
    )
    for step in steps:
        updates, state = update(state)
        if np.asarray(updates["kernel"]).any():
            closed.append(step + 1)
    np.testing.assert_array_equal(closed, run.held["micro_steps_before_each_update"])


class ModelRun(Run):
    """A run whose model is ours: of MiniGPT-4 behind the Q-Former, or of MiniGPT-v2 with its LoRA on the weights."""

    def __init__(self, golden: Any, name: str) -> None:
        super().__init__(golden, name)
        images = golden.pictures(f"optim/traj_{name}.npz")
        self.golden, self.has_lora = golden, any("lora_" in key for key in self.held)
        variant = "minigptv2" if self.has_lora else "minigpt4_v1"
        config, params = golden.minigpt4(images.shape[1], variant=variant)
        _, self.base = golden.llama("llama_mha")
        self.model = make_model(config, layout=DISK, dtype=jnp.float32)
        features, _ = apply_method(self.model, params, "encode_vision", images)
        batch = self.lay_out(self.prompt_template(variant), config.num_image_tokens)
        self.batch = TrainBatch(**batch, features=features)

    def prompt_template(self, variant: str) -> str:
        """What the original puts around an instruction: nothing where its prompt list had done so before."""
        template: str = next(
            case["prompt_template"]
            for case in self.golden.report(f"{variant}/cases.json").values()
            if "prompt_template" in case
        )
        return template or "{}"

    def lay_out(self, template: str, num_image_tokens: int) -> dict[str, jax.Array]:
        """The run's samples, tokenised as the sets' tokenizer does and laid out by this project."""
        tokenizer = self.golden.tokenizer("llama_mha")
        ids = self.golden.special_ids("llama_mha")
        examples, samples = [], self.facts["samples"]
        for text, answer in zip(samples["instruction_input"], samples["answer"], strict=True):
            segments = [
                tokenizer.encode(segment) for segment in template.format(text).split(PLACEHOLDER)
            ]
            prompt = batches.wrap_images(segments, num_image_tokens)
            pieces = (answer, *end_symbol_pieces(self.facts["end_sym"], tokenizer))
            target = encode_pieces(pieces, tokenizer, num_image_tokens=0)
            target = target[: self.facts["max_txt_len"]]
            examples.append(
                batches.join_example(
                    [ids["bos"], *prompt], target, ignored_targets=[tokenizer.pad_id]
                )
            )
        batch = batches.collate(examples, range(len(examples)), length_multiple=8)
        return {name: jnp.asarray(x) for name, x in batch.items() if name != "image_index"}

    def loss(self, trained: dict[str, Any]) -> Any:
        projection = {"kernel": trained["llama_proj.weight"].T, "bias": trained["llama_proj.bias"]}
        params = self.golden.with_trained(self.base, trained) if self.has_lora else self.base
        frozen = {"llama": params["llama"]}
        return loss_fn(projection, frozen, self.batch, model=self.model)[0]


def test_golden_run_of_the_trained_weights(golden: Any, model_run_case: str) -> None:
    run = ModelRun(golden, model_run_case)
    tx = make_optimizer(run.config)
    num_targets = int(run.batch.target_mask.sum())

    @jax.jit
    def step(trained: Any, opt_state: Any) -> Any:
        loss, grads = jax.value_and_grad(run.loss)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained, num_targets=num_targets)
        return optax.apply_updates(trained, updates), opt_state, loss

    trained: Any = jax.tree.map(jnp.asarray, run.weights("init"))
    opt_state, losses = tx.init(trained), []
    for number in range(1, len(run.held["losses"]) + 1):
        trained, opt_state, loss = step(trained, opt_state)
        losses.append(float(loss))
        if number == run.held["micro_steps_before_each_update"][0]:
            run.require_weights(trained, "after_first_update")
    tolerance = TINY_LOSS if run.is_tiny else LOSS
    np.testing.assert_allclose(losses, run.held["losses"], rtol=0, atol=tolerance)
    run.require_weights(trained, "final")


# --- checkpoints ---


def test_golden_checkpoint_of_the_trainer_starts_a_run(
    golden: Any, trainer_checkpoint: str
) -> None:
    path = golden.folder / "optim" / trainer_checkpoint
    saved = open_source(path)
    width, width_in = saved.shape("llama_proj.weight")
    model, _ = golden.llama("llama_mha")
    vit = dataclasses.replace(model.vit, width=width_in, num_heads=1)
    config = dataclasses.replace(model, vit=vit, patches_per_token=1)
    assert config.llama.width == width
    projection, _ = read_projection(path, config)
    found = {"llama_proj.weight": projection["kernel"].T, "llama_proj.bias": projection["bias"]}
    for name, value in found.items():
        np.testing.assert_array_equal(value, saved.get(name))
    # It is the end of the run with its settings, if the set holds that one.
    runs = golden.report("optim/trajectories.json")
    settings = open_pth(path).value["config"]["run"]
    ends = [name for name, facts in runs.items() if facts["run_cfg"] == settings]
    for name in ends:
        final = Run(golden, name).weights("final")
        assert all((final[key] == value).all() for key, value in found.items())
