"""What a training run is: every decision is a field of a frozen dataclass in this file.

For: `TrainConfig` and its parts. Not for: the sizes of models (`config.py`), reading them from YAML (`config_file.py`)
and anything that needs JAX.

The original spreads these over three YAML levels and `from_config` methods that drop keys in silence; here an
unknown key is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from minigpt4_jax.config import UserError, require_positive

PROMPTS = ("What is this?",)
PROMPT_TOKENS = 64
"""What an estimate takes a prompt to have, the template around it too: twice the published ones."""
SOURCE_KINDS = ("cc_sbu_align", "jsonl", "tar", "array_record", "tfds")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of the sources that a run mixes."""

    kind: str
    """`cc_sbu_align` (a folder), `jsonl` (a file of one's own), `tar` (webdataset shards), `array_record`, `tfds`."""
    path: str
    """The folder or file; for tars also a pattern such as `laion/*.tar`."""
    weight: float = 1.0
    """A source of weight 115 beside one of 14 gives 115 of every 129 samples, exactly."""
    caption_processor: str = "none"
    """`none`, or `blip_caption` for web captions, as the original reads them."""
    index: str = ""
    """Of tars: where their index is kept. Empty: in their folder."""

    def __post_init__(self) -> None:
        require_positive(self, "weight")
        if self.kind not in SOURCE_KINDS:
            raise UserError(
                f"The kind of a source is {self.kind!r}; expected one of {', '.join(SOURCE_KINDS)}."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads, and in which words the picture is asked about."""

    folder: str = ""
    """Short for one source: a folder in the `cc_sbu_align` format (`filter_cap.json` and `image/{image_id}.jpg`)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """By name; give these or `folder`."""
    max_corrupt_share: float = 0.01
    """A corrupt sample is replaced and counted; when more of a source than this share is corrupt, the run stops."""
    random_resized_crop: bool = False
    """A random part of each picture, as the released v1 weights were trained (see data/pixels.py)."""
    num_threads: int = 1
    """Threads that make batches ahead; more where pictures are decoded during training."""
    prompts: tuple[str, ...] = PROMPTS
    """One is drawn per sample (seeded by its index) where the annotation brings no prompt of its own. An empty list is
    the original's first stage: no prompt, not even the template's, only bos, picture and caption."""
    prompt_path: str = ""
    """A file of prompts instead, one a line, as the original's `prompts/alignment.txt`."""
    template: str = "chatml"
    end_sym: str = ""
    """After every answer: a control token by its spelling, or text. Empty: the template's own."""
    batch_size: int = 32
    """Of all processes together, which share it evenly."""
    length_multiple: int = 8
    """Sequences are padded up to a multiple of this, so that a run compiles only a few shapes."""
    length_buckets: tuple[int, ...] = ()
    """Lengths in tokens instead, ascending: a batch is padded up to the first that holds its longest sample, and their
    programs are compiled at the start. The last one must hold the longest sample there can be."""
    bucket_window: int = 1
    """Batches that are drawn together, sorted by length and shuffled again: with more than 1, samples of a length meet
    and less is padded. The order stays a function of the seed."""
    max_text_len: int = 160
    """Longest answer in tokens, end symbol included. A longer one is an error that names the sample."""
    max_context_len: int = 3800
    """Longest prompt in tokens, its picture included, bos not. A longer one is an error that shows it."""
    truncate: bool = False
    """Cut what is too long on its right instead, as the original does; the run says how much. A cut answer has no end
    symbol, a cut prompt can lose its picture."""
    mask_pad_token: bool = False
    """The tokenizer's pad token counts nothing in the loss even inside an answer: the original does so with `$$`."""
    seed: int = 42

    def __post_init__(self) -> None:
        require_positive(
            self,
            "batch_size",
            "length_multiple",
            "max_text_len",
            "max_context_len",
            "num_threads",
            "bucket_window",
        )
        if list(self.length_buckets) != sorted(set(self.length_buckets)) or any(
            length < 1 for length in self.length_buckets
        ):
            raise UserError(
                f"data.length_buckets is {list(self.length_buckets)}; expected lengths in tokens, ascending."
            )
        if self.bucket_window > 1 and not self.length_buckets:
            raise UserError(
                f"data.bucket_window is {self.bucket_window} without data.length_buckets; expected lengths to sort "
                "into. Name some, or set it to 1."
            )
        if not 0 <= self.max_corrupt_share <= 1:
            raise UserError(
                f"data.max_corrupt_share is {self.max_corrupt_share}; expected a share from 0 to 1."
            )
        if self.folder and self.sources:
            raise UserError(
                f"data.folder is {self.folder!r} and data.sources has {', '.join(self.sources)}; expected one of "
                "the two. Write the folder as a source of the kind cc_sbu_align."
            )
        if self.prompt_path and self.prompts != PROMPTS:
            raise UserError(
                f"data.prompt_path is {self.prompt_path!r} and data.prompts is {list(self.prompts)}; expected one of "
                "the two. Remove the other."
            )

    def all_sources(self) -> dict[str, SourceConfig]:
        """The sources, with `folder` written out."""
        if self.folder:
            return {"folder": SourceConfig(kind="cc_sbu_align", path=self.folder)}
        return self.sources

    def longest_sample(self, *, num_image_tokens: int) -> int:
        """Tokens of the longest sample with one picture, for estimates: the last bucket, or what the limits add up to.

        A prompt is not tokenised for this: `PROMPT_TOKENS` stand for it, bos and the template's own.
        """
        if self.length_buckets:
            return self.length_buckets[-1]
        words = PROMPT_TOKENS if self.prompts or self.prompt_path else 1
        return words + num_image_tokens + self.max_text_len


OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon (training/optimizer.py), and how the learning rate goes. One step is one batch.

    The defaults are the sane forms; docs/differences.md says which values give the original's, quirk for quirk.
    """

    name: str = "adamw"
    """`adamw`, as the original, or `muon` (see training/optimizer.py)."""
    lr_sched: Literal[
        "warmup_cosine", "warmup_step", "linear_warmup_cosine_lr", "linear_warmup_step_lr"
    ] = "warmup_cosine"
    """The first two warm up once and start to fall where the warm-up ends; the last two are the original's."""
    init_lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    """Learning rate of the first step. Below 0: `init_lr`, so that there is no warm-up."""
    warmup_steps: int = 100
    max_steps: int = 1000
    """Batches in the whole run: the original's `max_epoch * iters_per_epoch`."""
    iters_per_epoch: int = 0
    """Steps that count as an epoch where a schedule or the original's accumulation asks for one. 0: the whole run."""
    lr_decay_rate: float = 1.0
    """What the `step` schedules multiply the rate with after each epoch."""
    accum_grad_iters: int = 1
    """Batches per update of the projection."""
    accum_grads: Literal["mean", "sum"] = "mean"
    """`mean`: over all counted tokens of these batches, as if they were one. `sum`: of the batches' own means, counted
    within an epoch, what is left over kept for the next: as the original."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    """Of AdamW; Muon has its own."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(
                f"optimizer.name is {self.name!r}; expected one of {', '.join(OPTIMIZERS)}."
            )
        require_positive(self, "init_lr", "max_steps", "eps", "lr_decay_rate", "accum_grad_iters")
        original = self.lr_sched.startswith("linear_")  # its runs may end within the warm-up
        if not 0 <= self.warmup_steps <= (self.warmup_steps if original else self.max_steps):
            raise UserError(
                f"optimizer.warmup_steps is {self.warmup_steps}; expected 0 to max_steps ({self.max_steps})."
            )
        if self.iters_per_epoch < 0:
            raise UserError(
                f"optimizer.iters_per_epoch is {self.iters_per_epoch}; expected the steps of an epoch, or 0."
            )
        if self.accum_grads == "mean" and self.max_steps % self.accum_grad_iters:
            raise UserError(
                f"optimizer.max_steps is {self.max_steps} and accum_grad_iters {self.accum_grad_iters}; expected a "
                "multiple of it: the last batches would be read and never used."
            )
        if self.accum_grads == "sum" and self.accum_grad_iters > self.epoch_steps:
            raise UserError(
                f"optimizer.accum_grad_iters is {self.accum_grad_iters} in epochs of {self.epoch_steps} steps; with "
                "accum_grads=sum no update would ever be made. Use mean, or longer epochs."
            )

    @property
    def epoch_steps(self) -> int:
        """Batches in an epoch."""
        return self.iters_per_epoch or self.max_steps


REMAT = ("none", "names", "full")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices share what. 0 leaves a size to the run; all three 0 (`auto`) choose by the memory there is."""

    data: int = 0
    """The batch in slices, the weights whole: the only axis that should cross slow networks."""
    fsdp: int = 0
    """The batch in slices, and the frozen weights too: gathered layer by layer."""
    tensor: int = 0
    """The matrix products in slices; the batch whole."""

    def __post_init__(self) -> None:
        if min(self.data, self.fsdp, self.tensor) < 0:
            raise UserError(
                f"mesh is data={self.data} fsdp={self.fsdp} tensor={self.tensor}; expected numbers of devices, or 0 "
                "for one that the run chooses."
            )


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of one run, one a host. Left alone: found on TPU pods, SLURM and Kubernetes; else there is one."""

    coordinator: str = ""
    """`host:port` of process 0, which all others can reach."""
    num_processes: int = 0
    process_id: int = -1
    """From 0."""
    timeout_s: int = 300
    """How long a process waits for the others before it gives up with code 76, to be started again."""
    heartbeat_s: int = 100
    """A process that was silent for so long counts as dead, and all others end."""

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s", "heartbeat_s")
        given = (bool(self.coordinator), self.num_processes > 0, self.process_id >= 0)
        if any(given) and not all(given):
            raise UserError(
                f"distributed is coordinator={self.coordinator!r} num_processes={self.num_processes} "
                f"process_id={self.process_id}; expected all three or none of them."
            )
        if all(given) and self.process_id >= self.num_processes:
            raise UserError(
                f"distributed.process_id is {self.process_id} of {self.num_processes} processes; expected 0 to "
                f"{self.num_processes - 1}."
            )


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Samples that the run never trains on, looked at while it goes on."""

    folder: str = ""
    """Short for one source, as `data.folder`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    every: int = 0
    """Steps between two looks, the first one before any step; 0: none but at the end, if there are sources."""
    max_samples: int = 256
    """Of these the mean loss; the same ones every time."""
    captions: int = 4
    """Of so many pictures the model's answer is shown and kept; 0: none. Each look loads the model once more, as it
    is used for answers, onto one device, and drops it: 15.7 GB for 7B in bfloat16."""
    max_new_tokens: int = 40

    def __post_init__(self) -> None:
        require_positive(self, "max_samples", "max_new_tokens")
        if self.folder and self.sources:
            raise UserError(
                f"held_out.folder is {self.folder!r} and held_out.sources has {', '.join(self.sources)}; expected one "
                "of the two."
            )
        if self.every < 0 or self.captions < 0:
            raise UserError(
                f"held_out.every is {self.every} and held_out.captions {self.captions}; expected 0 or more."
            )
        if self.every and not self.all_sources():
            raise UserError(
                f"held_out.every is {self.every} without held_out.folder or held_out.sources; expected samples to look "
                "at. Name some, or set it to 0."
            )

    def all_sources(self) -> dict[str, SourceConfig]:
        """The sources, with `folder` written out."""
        if self.folder:
            return {"held_out": SourceConfig(kind="cc_sbu_align", path=self.folder)}
        return self.sources


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A window of steps that `jax.profiler` records into `<workdir>/profile`."""

    start_step: int = 10
    num_steps: int = 0
    """0: none."""

    def __post_init__(self) -> None:
        if self.start_step < 0 or self.num_steps < 0:
            raise UserError(
                f"profile.start_step is {self.start_step} and profile.num_steps {self.num_steps}; expected 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of the projection."""

    model: str = "smol"
    """`smol`, or the folder (a path or URL) that `python -m convert` wrote."""
    workdir: str = ""
    """Checkpoints, the metrics and the finished projection go here; a run that is started again resumes here."""
    init_projection: str = "ridge"
    """`ridge` (closed form, see training/init.py), `random`, or the path of a projection file."""
    dtype: str = "auto"
    """Storage and compute dtype of the frozen weights: `float32`, `bfloat16`, or `auto` (float32 on a CPU)."""
    feature_cache: str = ""
    """Where the frozen vision features are kept. Empty: `<workdir>/features`."""
    cache_features: bool = True
    """Pictures are encoded once, before training. False: in every step, for sets too large for that."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    licence: str = ""
    """Written into the finished projection's header: the terms of what was trained."""
    attribution: str = ""
    """Written beside it: whose pictures and words it was trained on, as their licences ask."""
    tensorboard: bool = True
    """Also write the metrics as TensorBoard events to `<workdir>/tensorboard`."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    remat: str = "names"
    """What the backward pass finds ready: `none` computes nothing again, `names` keeps what frozen products need,
    `full` computes each layer again (least memory)."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    save_every: int = 200
    """Steps between two checkpoints."""
    save_every_minutes: float = 10.0
    """And so many minutes after the last one, whichever comes first; 0: by steps only."""
    max_failed_saves: int = 5
    """Checkpoints in a row that may fail (a full disk) before the run stops."""
    log_every: int = 10
    max_to_keep: int = 2
    watchdog_s: float = 600.0
    """All stacks are printed when no step finishes for so long; 0: never."""
    seed: int = 42

    def __post_init__(self) -> None:
        require_positive(self, "save_every", "log_every", "max_to_keep", "max_failed_saves")
        if self.save_every_minutes < 0 or self.watchdog_s < 0:
            raise UserError(
                f"save_every_minutes is {self.save_every_minutes} and watchdog_s {self.watchdog_s}; expected 0 or more."
            )
        if self.remat not in REMAT:
            raise UserError(f"remat is {self.remat!r}; expected one of {', '.join(REMAT)}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; expected one of auto, float32, bfloat16.")
        if self.data.random_resized_crop and self.cache_features:
            raise UserError(
                "data.random_resized_crop is true with cache_features true; expected one view per picture in a cache. "
                "Set cache_features=false, or leave the crop out."
            )
        if self.init_projection == "ridge" and not self.cache_features:
            raise UserError(
                "init_projection is 'ridge' with cache_features false; expected random or a file: the closed form "
                "needs the features of all pictures. Set init_projection=random."
            )
