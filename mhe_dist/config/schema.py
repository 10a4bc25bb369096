"""Models of the YAML that describes a run: every key, its default, its meaning, its limits.

Free of torch, so that the command line answers at once. `load.py` reads files and
overrides into these models and words the mistakes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from mhe_dist.config.data import DataConfig
from mhe_dist.config.head import HeadConfig
from mhe_dist.config.scale import ScaleConfig
from mhe_dist.config.section import (
    Alternatives,
    ConfigSection,
    Decay,
    FolderText,
    PathText,
    PathTexts,
    PositiveFloat,
    PositiveInt,
)

CHECKED_LATER = {"combinations_later": True}  # a context: contradictions between keys may pass


class RunConfig(ConfigSection):
    """What the run is called and where its results go."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run; the same name continues the same run.",
    )
    dir: FolderText = Field(
        "runs", min_length=1, description="Folder or fsspec URL that holds the runs."
    )
    seed: int = Field(0, ge=0, description="The seed of everything that is drawn.")

    @property
    def path(self) -> str:
        """Folder or URL of this run: `dir/name`."""
        return f"{self.dir.rstrip('/')}/{self.name}"


class ModelConfig(ConfigSection):
    """The backbone: a timm model whose classifier is the embedding layer."""

    name: str = Field("resnet18", description="Name of a timm model.")
    kwargs: dict[str, Any] = Field({}, description="Further arguments of timm.create_model.")
    embedding_dim: PositiveInt = Field(512, description="D: width of the embedding.")
    neck: Literal["none", "batchnorm"] = Field(
        "batchnorm", description="What follows the embedding layer; folded into it on export."
    )
    init_from: PathText = Field(
        "", description="Weights to begin with: .pth, .safetensors, exported folder, run; or none."
    )
    mean: tuple[float, float, float] | None = Field(
        None,
        description="Subtracted from red, green, blue in [0, 1]; null: 0.5, so that images are in "
        "[-1, 1], or with kwargs: {pretrained: true} what timm's weights were trained with.",
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        None, description="Divided by afterwards; null: 0.5, or as for mean."
    )
    grad_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory."
    )
    compile: bool = Field(
        False, description="torch.compile the backbone; on a CPU that needs a C++ compiler."
    )


class OptimConfig(ConfigSection):
    """The optimizer and schedule of the backbone."""

    alternatives = (
        Alternatives("kind", {"sgd": ("momentum",), "adamw": ("betas",)}),
        Alternatives(
            "schedule",
            {"constant": (), "cosine": ("final_lr",), "polynomial": ("final_lr", "power")},
        ),
    )

    kind: Literal["sgd", "adamw"] = Field("sgd", description="Optimizer of the backbone.")
    lr: PositiveFloat = Field(0.1, description="Peak learning rate.")
    momentum: Decay = Field(0.9, description="sgd: momentum.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="adamw: decay of both moments.")
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay.")
    decay_vectors: bool = Field(
        False, description="Weight decay of vectors too: biases, the weights of norms, PReLU."
    )
    schedule: Literal["constant", "cosine", "polynomial"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear growth from 0.")
    final_lr: float = Field(0.0, ge=0, description="Learning rate of the last step.")
    power: PositiveFloat = Field(2.0, description="polynomial: the exponent.")
    clip_norm: float = Field(
        0.0, ge=0, description="Largest gradient norm of the backbone; 0: no clipping."
    )
    ema: Decay = Field(
        0.0, description="Decay per step of averaged weights, evaluated and exported; 0: none."
    )


class TrainConfig(ConfigSection):
    """How long and in which pieces."""

    epochs: PositiveFloat = Field(20.0, description="Passes over the data.")
    max_steps: int = Field(0, ge=0, description="Stop the schedule at this step; 0: by epochs.")
    global_batch: PositiveInt = Field(512, description="Images per optimizer step, over all ranks.")
    micro_batch: PositiveInt = Field(
        128, description="B: images per forward pass on one rank, whatever the number of ranks."
    )
    precision: Literal["auto", "bf16", "float32"] = Field(
        "auto",
        description="bf16: autocast of the backbone; auto: bf16 where the hardware multiplies it, "
        "else float32, whose rounding does not depend on the number of ranks; fp16 is not offered.",
    )
    log_every: PositiveInt = Field(10, description="Steps between two records of the metrics.")
    audit_every: int = Field(
        0,
        ge=0,
        description="Steps between two records of the share of images whose class is doubted: "
        "without margin, another class compared in the step is nearer; 0: none.",
    )

    @property
    def micro_batches(self) -> int:
        """n: micro-batches of a step, over all ranks."""
        return self.global_batch // self.micro_batch


class EvaluateConfig(ConfigSection):
    """Held-out evaluation of the embedding, and of the head."""

    shards: PathText = Field(
        "", description="Folder or URL of held-out shards; empty: no evaluation."
    )
    every_steps: int = Field(0, ge=0, description="Steps between evaluations; 0: at the end only.")
    pairs: PositiveInt = Field(
        6000, description="Pairs drawn for 1:1 verification, half of them same."
    )
    flip: bool = Field(
        False,
        description="Of shards and own images: add the mirrored one; .bin sets always have it.",
    )
    typefaces: dict[str, str] = Field(
        {},
        description="Glyphs: figures for the probes of some typefaces alone, each by a name of "
        "yours and a pattern (* and ?) of font files.",
    )
    verification: PathTexts = Field(
        [], description="InsightFace .bin files (lfw.bin, ...) to verify on at each evaluation."
    )
    classification: PathText = Field(
        "",
        description="Shards with other images of the training classes, by the same ids: how many "
        "of them the head gives their own class, of all classes, at each evaluation.",
    )
    labels: PathText = Field(
        "",
        description="Shards with other images of the training classes, several to an image: how "
        "well the head ranks the classes that label_set gives them, at each evaluation.",
    )
    label_set: PathText = Field(
        "", description="Label set of the shards that `labels` names, by the training's class ids."
    )

    @property
    def has_sets(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.shards or self.verification or self.classification or self.labels)


class CheckpointConfig(ConfigSection):
    """When to save and what to keep."""

    every_steps: int = Field(500, ge=0, description="Steps between saves; 0: none by steps.")
    every_minutes: float = Field(
        0.0, ge=0, description="Minutes after a save when another is due; 0: none by time."
    )
    keep_last: PositiveInt = Field(2, description="Newest complete checkpoints that are kept.")
    keep_every: int = Field(
        0, ge=0, description="Checkpoints of steps that this divides are kept; 0: none."
    )
    keep_best: str = Field(
        "",
        description="Held-out metric, such as rank1, whose best checkpoint is kept too; -NAME: the "
        "lowest is the best. Every evaluated step is then saved; empty: none.",
    )


class GuardConfig(ConfigSection):
    """What counts as divergence, and what follows from it."""

    on_divergence: Literal["stop", "rollback", "ignore"] = Field(
        "stop",
        description="When the loss or the gradient is not finite: end the run, or go back to the "
        "checkpoint before and leave those batches out; a bundle in divergence/ says more.",
    )
    spike: float = Field(
        0.0, ge=0, description="A loss this many times the running mean diverges, too; 0: never."
    )
    max_rollbacks: int = Field(3, ge=0, description="Rollbacks after which the run ends.")


class TrackingConfig(ConfigSection):
    """Where the metrics go, beside metrics.jsonl in the run's folder."""

    mlflow: bool = Field(True, description="Log to MLflow.")
    uri: str = Field(
        "", description="MLflow server; empty: MLFLOW_TRACKING_URI, or SQLite in run.dir."
    )
    experiment: str = Field("mhe", description="MLflow experiment.")
    tensorboard: bool = Field(
        False, description="Write events for TensorBoard into tensorboard/ of the run, too."
    )


class ExportConfig(ConfigSection):
    """What is written when the training ends."""

    formats: list[Literal["timm", "onnx", "torch-export", "mlflow", "hub-folder"]] = Field(
        ["timm", "onnx"], description="Formats of the exported backbone."
    )


class ResumeConfig(ConfigSection):
    """With what a run may go on that it did not begin with."""

    allow: list[str] = Field(
        [],
        description="Keys that may have another value, such as [optim.lr, train.epochs]; "
        "docs/survival.md lists those that need it and those that cannot change.",
    )


class Config(ConfigSection):
    """One run."""

    run: RunConfig = Field(RunConfig(), description="Name and place of the run.")
    data: DataConfig = Field(..., description="The images.")
    model: ModelConfig = Field(ModelConfig(), description="The backbone.")
    head: HeadConfig = Field(HeadConfig(), description="The classifier.")
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer of the backbone.")
    train: TrainConfig = Field(TrainConfig(), description="Length and batches.")
    scale: ScaleConfig = Field(ScaleConfig(), description="Workers.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Held-out evaluation.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="Checkpoints.")
    guard: GuardConfig = Field(GuardConfig(), description="Divergence.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow.")
    export: ExportConfig = Field(ExportConfig(), description="Exported backbone.")
    resume: ResumeConfig = Field(ResumeConfig(), description="Changes of a run that goes on.")

    def group_sizes(self) -> list[int]:
        """Numbers of workers that the run can have: they divide the micro-batches of a step."""
        sizes = range(self.scale.fewest, self.scale.workers + 1)
        return [size for size in sizes if self.train.micro_batches % size == 0]

    @model_validator(mode="after")
    def _values_agree(self, info: ValidationInfo) -> Config:
        """Refuse contradictions, unless the context says that the caller looks for them."""
        later = (info.context or {}).get("combinations_later")
        if not later and (wrong := validate_combinations(self)):
            raise ValueError("; ".join(wrong))
        return self


def validate_combinations(config: Config) -> list[str]:
    """Say which values contradict one another, a sentence each that names every key it is about."""
    data, optim, scale, evaluate = config.data, config.optim, config.scale, config.evaluate
    wrong = _validate_sizes(config)
    if "://" in data.remote.cache_dir:
        wrong.append(
            f"data.remote.cache_dir={data.remote.cache_dir} is a URL; it has to be a folder of a "
            "disk of each host"
        )
    if bool(evaluate.labels) != bool(evaluate.label_set):
        wrong.append(
            f"evaluate.labels={evaluate.labels!r} names shards and evaluate.label_set="
            f"{evaluate.label_set!r} the label set that gives them their classes: give both "
            "or neither"
        )
    wrong += config.head.refuse_several_labels(data.labels_per_sample)
    workers = max(config.group_sizes(), default=scale.workers)
    wrong += config.head.validate_combinations(workers, config.run.dir)
    if scale.elastic and scale.placement.startswith("strict_"):
        wrong.append(
            f"scale.placement={scale.placement} is for a fixed number of workers: of "
            f"scale.min_workers={scale.min_workers} to {scale.workers} Ray takes as many as have "
            "room, however they are placed; give scale.placement="
            f"{scale.placement.removeprefix('strict_')}, or leave scale.min_workers out"
        )
    if optim.ema and scale.zero_stage == 3:
        wrong.append(
            f"optim.ema={optim.ema} needs whole weights on each rank, but scale.zero_stage=3 cuts "
            "them"
        )
    if config.model.compile and scale.zero_stage == 3:
        wrong.append(
            "model.compile=true takes the network as one piece, but scale.zero_stage=3 cuts its "
            "weights layer by layer"
        )
    if config.checkpoint.keep_best and not (evaluate.every_steps and evaluate.has_sets):
        wrong.append(
            f"checkpoint.keep_best={config.checkpoint.keep_best} needs evaluate.every_steps, and "
            "evaluate.shards, verification, classification or labels: without evaluations no "
            "checkpoint has a score"
        )
    if optim.final_lr > optim.lr:
        wrong.append(f"optim.final_lr={optim.final_lr} is more than optim.lr={optim.lr}")
    return wrong


def _validate_sizes(config: Config) -> list[str]:
    """Micro-batches, workers and streams must divide one another (docs/design.md section 5)."""
    train, data, scale = config.train, config.data, config.scale
    wrong = []
    if scale.min_workers > scale.workers:
        wrong.append(
            f"scale.min_workers={scale.min_workers} is more than scale.workers={scale.workers}"
        )
    if train.global_batch % train.micro_batch:
        wrong.append(
            f"train.global_batch={train.global_batch} is not a multiple of "
            f"train.micro_batch={train.micro_batch}"
        )
    else:
        sizes = "train.global_batch / train.micro_batch"
        step = f"{train.micro_batches} micro-batches of a step ({sizes})"
        if not config.group_sizes() and scale.min_workers <= scale.workers:
            between = f"no number from scale.min_workers={scale.min_workers} to "
            prefix = between if scale.elastic else ""
            verb = "divides" if scale.elastic else "does not divide"
            wrong.append(f"{prefix}scale.workers={scale.workers} {verb} the {step}")
        if data.streams % train.micro_batches:
            wrong.append(f"data.streams={data.streams} is not a multiple of the {step}")
    if train.global_batch % data.streams:
        wrong.append(
            f"train.global_batch={train.global_batch} is not a multiple of "
            f"data.streams={data.streams}"
        )
    return wrong
