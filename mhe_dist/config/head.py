"""The blocks of the config about the classifier."""

from __future__ import annotations

from typing import Final, Literal, TypeVar

from pydantic import Field

from mhe_dist.config.section import (
    Alternatives,
    ConfigSection,
    CountOrAuto,
    Decay,
    FolderText,
    Fraction,
    MarginOrAuto,
    PathText,
    PositiveFloat,
    PositiveInt,
    PositiveIntOrAuto,
)
from mhe_dist.errors import UserError

AUTO: Final = "auto"
GROUPS_KEY: Final = "head.groups"
MARGIN_KEY: Final = "head.margin.m"
AUTO_KEYS: Final = (GROUPS_KEY, "head.mhs.length", "head.mhs.extra_heads", MARGIN_KEY)
"""Keys whose `auto` becomes a number once, when a run begins."""


Number = TypeVar("Number", int, float)


def chosen_number(key: str, value: Number | Literal["auto"]) -> Number:
    """The number of one of `AUTO_KEYS`.

    Raises:
        UserError: nothing has chosen it yet.
    """
    if value == AUTO:
        raise UserError(
            f"{key}=auto: nothing has chosen a number yet, which follows from the classes and the "
            "workers of a run; give a number here"
        )
    return value


class MarginConfig(ConfigSection):
    """What the head does to the logits before the softmax."""

    alternatives = (
        Alternatives(
            "kind",
            {
                "none": (),
                "softmax": ("scale", "filter"),
                "arcface": ("scale", "m", "warmup_steps", "filter"),
                "cosface": ("scale", "m", "warmup_steps", "filter"),
                "combined": ("scale", "m1", "m2", "m3", "warmup_steps", "filter"),
                "adaface": ("scale", "m", "h", "ema", "warmup_steps", "filter"),
            },
        ),
    )

    kind: Literal["none", "softmax", "arcface", "cosface", "combined", "adaface"] = Field(
        "cosface", description="none: inner product and bias; softmax: scaled cosine, no margin."
    )
    scale: PositiveFloat = Field(64.0, description="s: what cosines are multiplied with.")
    m: MarginOrAuto = Field(
        0.4,
        description="The margin of arcface, cosface and adaface; auto: cosface's, by the share of "
        "the classes that a sample meets.",
    )
    m1: PositiveFloat = Field(1.0, description="combined: cos(m1 * theta + m2) - m3.")
    m2: float = Field(0.0, ge=0, lt=1.6, description="combined: cos(m1 * theta + m2) - m3.")
    m3: float = Field(0.0, ge=0, description="combined: cos(m1 * theta + m2) - m3.")
    h: PositiveFloat = Field(0.333, description="adaface: concentration of the norms.")
    ema: Fraction = Field(0.01, description="adaface: weight of a new batch in the running norms.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the margin grows from 0.")
    filter: float = Field(
        0.0, ge=0, le=1, description="Drop negatives whose cosine exceeds this; 0: keep all."
    )

    @property
    def chosen_m(self) -> float:
        """m; UserError while it is `auto`."""
        return chosen_number(MARGIN_KEY, self.m)


class BankConfig(ConfigSection):
    """How a rank stores the class centres of its partition."""

    memory: Literal["device", "host", "file"] = Field("device", description="Where rows are kept.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Stored type of rows; bfloat16 is rounded stochastically."
    )
    path: FolderText = Field(
        "", description="file: folder for the row files; empty: inside the run."
    )
    init_length: PositiveFloat = Field(
        1.0, description="Length that rows begin with; the shorter, the faster they turn."
    )


class HeadOptimConfig(ConfigSection):
    """The optimizer of the rows; its learning rate follows the backbone's schedule."""

    alternatives = (Alternatives("kind", {"sgd": ("momentum",), "adamw": ("betas", "eps")}),)

    kind: Literal["sgd", "adamw"] = Field("sgd", description="Row-sparse optimizer.")
    lr_scale: PositiveFloat = Field(1.0, description="Rows learn at optim.lr times this.")
    momentum: Decay = Field(0.9, description="sgd: momentum.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="adamw: decay of both moments.")
    eps: PositiveFloat = Field(1e-8, description="adamw: added to the root.")
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay of the touched rows.")


class MhsConfig(ConfigSection):
    """Multi-Head Sampling."""

    length: PositiveIntOrAuto = Field(
        AUTO, description="L: classes in a head; auto: by classes, workers and memory traffic."
    )
    extra_heads: CountOrAuto = Field(
        AUTO, description="m: extra heads per group (route) or in all (gather); auto: likewise."
    )
    exchange: Literal["route", "gather"] = Field(
        "route", description="route: samples travel to their heads; gather: every rank sees all."
    )
    negatives: Literal["own", "own_plus", "batch"] = Field(
        "own_plus",
        description="The softmax's classes: own head, own + m, or the batch's heads + m.",
    )
    correction: bool = Field(False, description="Add log(1/q) to sampled negatives' logits.")
    repartition_every: int = Field(
        0,
        ge=0,
        description="Epochs after which classes move to other heads, but near the end; 0: never.",
    )

    @property
    def chosen_length(self) -> int:
        """L; UserError while it is `auto`."""
        return chosen_number("head.mhs.length", self.length)

    @property
    def chosen_extra_heads(self) -> int:
        """m; UserError while it is `auto`."""
        return chosen_number("head.mhs.extra_heads", self.extra_heads)


class PartialFcConfig(ConfigSection):
    """PartialFC: positives of the batch and a random share of the other classes."""

    rate: float = Field(0.1, gt=0, le=1, description="Share of each group's classes in a step.")


class MhpConfig(ConfigSection):
    """Multi-Head Product."""

    lengths: list[PositiveInt] = Field(
        [], description="Classes per head, most significant first; empty: two near the root of C."
    )


class MhcConfig(ConfigSection):
    """Multi-Head Cascade."""

    lengths: list[PositiveInt] = Field(
        [], description="Classes per level, most significant first; empty: two near the root of C."
    )
    candidates: PositiveInt = Field(8, description="k: candidates that a level hands to the next.")
    multi_label: bool = Field(
        False, description="Older name of head.objective=multi_label, for this head alone."
    )


class HeadConfig(ConfigSection):
    """The classifier over all classes; thrown away after pretraining."""

    alternatives = (
        Alternatives(
            "kind",
            {
                "full": ("objective",),
                "partial_fc": ("partial_fc", "objective"),
                "mhs": ("mhs", "objective"),
                "mhp": ("mhp",),
                "mhc": ("mhc", "objective"),
            },
        ),
    )

    kind: Literal["full", "partial_fc", "mhs", "mhp", "mhc"] = Field(
        "mhs", description="Which head; the block of the same name configures it."
    )
    init_from: PathText = Field(
        "", description="Run or step_* folder whose rows a new run begins with; empty: none."
    )
    objective: Literal["softmax", "multi_label"] = Field(
        "softmax",
        description="softmax: each label is a target of its own; multi_label: the two separated "
        "sums of arXiv 2407.17331 over labels and negatives, of mhc the binary cross-entropy of "
        "each level.",
    )
    margin: MarginConfig = Field(MarginConfig(), description="What happens to the logits.")
    bank: BankConfig = Field(BankConfig(), description="How class centres are stored.")
    optim: HeadOptimConfig = Field(HeadOptimConfig(), description="How class centres learn.")
    matmul: Literal["auto", "float32", "tf32"] = Field(
        "auto",
        description="How GPUs compute the head's products in training; tf32 is faster and has a "
        "mantissa of 10 bits; auto: tf32 in bf16 runs, else float32.",
    )
    groups: PositiveIntOrAuto = Field(
        AUTO,
        description="G: fixed parts of the rows, one per worker at least; a rank owns whole ones; "
        "auto: as many as the batches can use workers, up to 8 or four times the workers.",
    )
    on_bad_label: Literal["fail", "ignore"] = Field(
        "fail", description="What to do with a label outside [0, C)."
    )
    mhs: MhsConfig = Field(MhsConfig(), description="Multi-Head Sampling.")
    partial_fc: PartialFcConfig = Field(PartialFcConfig(), description="PartialFC.")
    mhp: MhpConfig = Field(MhpConfig(), description="Multi-Head Product.")
    mhc: MhcConfig = Field(MhcConfig(), description="Multi-Head Cascade.")

    @property
    def cascade_is_multi_label(self) -> bool:
        """Whether a Multi-Head Cascade takes any number of labels per sample."""
        return self.mhc.multi_label or self.objective == "multi_label"

    @property
    def chosen_groups(self) -> int:
        """G; UserError while it is `auto`."""
        return chosen_number(GROUPS_KEY, self.groups)

    @property
    def lengths(self) -> list[int]:
        """Of the levels of mhp and mhc, most significant first; empty: balanced, or no levels."""
        return {"mhp": self.mhp.lengths, "mhc": self.mhc.lengths}.get(self.kind, [])

    @property
    def gathers(self) -> bool:
        """Whether every rank scores the embeddings of all ranks."""
        return self.kind in ("full", "partial_fc") or (
            self.kind == "mhs" and self.mhs.exchange == "gather"
        )

    def refuse_several_labels(self, per_sample: int) -> list[str]:
        """Say that this head learns one label per sample, if a sample may have `per_sample`."""
        one_label = {"mhp": "head.kind=mhp"}
        if not self.cascade_is_multi_label:
            one_label["mhc"] = "head.kind=mhc with head.objective=softmax"
        if per_sample < 2 or self.kind not in one_label:
            return []
        return [
            f"data.labels_per_sample={per_sample}: {one_label[self.kind]} learns one class per "
            "image; full, partial_fc, mhs, and mhc with head.objective=multi_label learn several"
        ]

    def validate_combinations(self, workers: int, run_dir: str = "") -> list[str]:
        """Say which values contradict one another, that many workers, or the folder of the runs."""
        wrong = []
        if self.kind != "mhp" and self.groups != AUTO and self.groups < workers:
            wrong.append(f"head.groups={self.groups} is less than scale.workers={workers}")
        routed = self.kind == "mhs" and self.mhs.exchange == "route"
        if routed and self.mhs.negatives == "batch":
            wrong.append(
                "head.mhs.negatives=batch needs head.mhs.exchange=gather: with route a sample "
                "meets only its own head and the extra ones"
            )
        key, folder = ("head.bank.path", self.bank.path) if self.bank.path else ("run.dir", run_dir)
        if self.bank.memory == "file" and "://" in folder:
            wrong.append(
                f"head.bank.memory=file maps files, but {key}={folder} is a URL; let "
                "head.bank.path name a folder of a disk of each host"
            )
        if self.margin.m == AUTO and not self._has_margin_rule:
            wrong.append(
                f"{MARGIN_KEY}=auto is a rule for the softmax of full, partial_fc and mhs with "
                f"head.margin.kind=cosface; give a number for head.kind={self.kind}, "
                f"head.objective={self.objective}, head.margin.kind={self.margin.kind}"
            )
        return wrong

    @property
    def _has_margin_rule(self) -> bool:
        is_softmax = self.kind not in ("mhp", "mhc") and self.objective == "softmax"
        return is_softmax and self.margin.kind == "cosface"
