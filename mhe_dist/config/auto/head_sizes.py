"""The rule that chooses a head, and the numbers for what is `auto` in it: sizes and margin.

One rule for `mhe init`, for `auto`, for preflight and for docs/choosing.md.

What it follows from, of the studies in docs/results.md (6,000 classes, three seeds):
- A tenth of the classes is as good as all of them (`mhs`, own head of 600: 97.2 % and 55.5 %
  rank-1 on the two typefaces; `full`: 97.6 % and 53.5 %), also a tenth of 94,000. Below 375
  classes accuracy falls: with 100 it is the TAR that suffers (30 % instead of 38 to 40 %).
- Of heads that meet a tenth, one long own head alone is the best on the hard typeface: its rows
  learn in nearly every step. Extra heads drawn in each step come close (52.8 %), PartialFC, which
  draws single classes, does not (48.6 %). Long heads were measured with 600 classes only, so a
  tenth that exceeds 4,096, up to which GPUs have a kernel, comes from short heads and extra ones,
  as in the study of 94,000 classes (own + 72 of 128).

What it adds where nothing was measured, from 10^5 classes to 10^9: the budget of memory traffic
decides. Rows that a worker meets in a forward pass, times D, times their bytes, are what a head
costs. A long own head costs `min(C / W, B * L)` rows, as many as all of the worker's if those are
few; beyond the budget heads are short, and extra heads, which all samples of a group share, bring
the classes. More than 10,000 classes are never aimed at: no study met more with a part of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from mhe_dist.config.head import AUTO, AUTO_KEYS, GROUPS_KEY, MARGIN_KEY, HeadConfig, MhsConfig
from mhe_dist.config.schema import Config
from mhe_dist.sizes import MIB

MOST_CLASSES_OF_FULL: Final = 20_000
"""Up to so many classes the full softmax is the better head, and not much dearer.

A round number between 6,000 classes, where it finds the most in the easy typeface, and 94,000,
where `mhs` does."""
SHARE_MET: Final = 10
"""A sample meets one of so many classes: a tenth."""
FEWEST_MET: Final = 375
"""Classes that a sample meets at least, whatever they cost: with 375 nothing was lost."""
MOST_MET: Final = 10_000
"""Classes that a sample meets at most: 9,308 of 94,000 is the most that a study met."""
BUDGET: Final = {False: 128 << 10, True: 2 << 20}
"""Bytes of rows that a worker meets in a forward pass, for each image of it.

Where rows lie in the memory of a GPU (True), 128 images may meet 256 MiB: read in the forward pass,
and read and written with their momentum in the update, they take about 1 ms of a card that moves
1.6 TB/s. Elsewhere (False), on CPUs or fetched to a GPU, 256 images may meet 32 MiB: 17 MiB took 40
ms of one core (docs/choosing.md), where the smallest network takes some 250.
"""
LONGEST: Final = 4096
"""Most classes of an own head that is alone (`mhe_dist.kernels.dispatch.MAX_LENGTH`)."""
SHORT_LENGTH: Final = (16, 128)
"""Least and most classes of a head that has extra ones beside it."""
GATHERED_LENGTH: Final = 10
"""Classes of a head whose sample meets all heads of the batch, as in the study."""
SPARE_GROUPS: Final = 4
FEWEST_GROUPS: Final = 8
"""Groups for four times the workers, or for eight, as far as the batches can use them."""

FULL_MARGIN: Final = 0.45
"""CosFace's margin for a softmax over all classes: the least that was best (`mhe reproduce
margins`, scale 32)."""
LARGEST_MARGIN: Final = 0.75
"""More was not measured, and with a small scale the rule would ask for more than cosines differ."""


class HeadDemand(NamedTuple):
    """What the sizes of a head follow from.

    Attributes:
        classes: C.
        dim: D, width of the embedding.
        workers: W, the most that the run may begin with.
        micro_batch: B, images of a forward pass.
        micro_batches: n of a step, over all workers; W divides it.
        gpu: whether workers have GPUs.
        labels: most labels of a sample.
    """

    classes: int
    dim: int
    workers: int
    micro_batch: int
    micro_batches: int
    gpu: bool
    labels: int = 1


class SizeChoice(NamedTuple):
    """The numbers of a head, and the reasons in words.

    Attributes:
        groups: G.
        length, extra_heads: L and m of `mhs`; 0 for other heads.
        why_groups, why_sizes: a sentence each; the second is empty for other heads.
        margin: m of CosFace, see `choose_margin`.
        why_margin: a sentence.
    """

    groups: int
    length: int
    extra_heads: int
    why_groups: str
    why_sizes: str
    margin: float
    why_margin: str

    def explain(self, keys: Sequence[str], classes: int) -> str:
        """Why some of `AUTO_KEYS` are so, and what the rule would take instead of this head."""
        why = [self.why_sizes] if set(keys) - {GROUPS_KEY, MARGIN_KEY} else []
        why += [self.why_groups] if GROUPS_KEY in keys else []
        why += [self.why_margin] if MARGIN_KEY in keys else []
        few = f"with {classes:,} classes head.kind=full finds no less (docs/choosing.md)"
        advice = [few] if self.length and choose_kind(classes) == "full" else []
        return "; ".join([*why, *advice])


class _Rows(NamedTuple):
    """Rows of one worker: those it has, those it may meet in a forward pass, and who meets them.

    Attributes:
        owned: C / W.
        budget: that a forward pass may meet.
        samples: labels that come to the worker in a forward pass, each with its own head.
    """

    owned: float
    budget: float
    samples: float

    def own(self, length: int) -> float:
        """Rows of own heads that a forward pass meets."""
        return min(self.owned, self.samples * length)


def choose_kind(classes: int) -> Literal["full", "mhs"]:
    """The head for so many classes."""
    return "full" if classes <= MOST_CLASSES_OF_FULL else "mhs"


def demand_of(config: Config, classes: int, ranks: int = 1) -> HeadDemand:
    """What a run with C classes, on `ranks` workers or more, demands of its head."""
    return HeadDemand(
        classes,
        config.model.embedding_dim,
        max([ranks, *config.group_sizes()]),
        config.train.micro_batch,
        config.train.micro_batches,
        config.scale.gpu,
        max(1, config.data.labels_per_sample),
    )


def choose_sizes(head: HeadConfig, demand: HeadDemand) -> SizeChoice:
    """Groups, length and extra heads; numbers that the config gives are kept, and reckoned with."""
    groups = choose_groups(head, demand) if head.groups == AUTO else head.groups
    plural, most_used = "s" if groups > 1 else "", demand.micro_batches
    why_groups = (
        f"with {groups} group{plural}, of which a worker owns whole ones, there can be up to "
        f"{groups} workers; the {most_used} micro-batches of a step allow {most_used}"
    )
    length, extra, why_sizes = 0, 0, ""
    if head.kind == "mhs":
        rows = _count_rows(head, demand)
        length = _choose_length(head.mhs, demand, groups, rows)
        extra = _choose_extra_heads(head.mhs, demand, groups, length, rows)
        why_sizes = _explain(head, demand, rows, length, extra)
        head = head.model_copy(update={"mhs": _fill_mhs(head.mhs, length, extra)})
    margin, why_margin = choose_margin(head, demand, groups)
    return SizeChoice(groups, length, extra, why_groups, why_sizes, margin, why_margin)


def choose_margin(head: HeadConfig, demand: HeadDemand, groups: int) -> tuple[float, str]:
    """CosFace's m for a softmax that has n of C classes, and why: `FULL_MARGIN + ln(C / n) / s`.

    Negatives with similar cosines add up to n times one of them, so the target's probability is
    that of a logistic function of `s (cos - m) - ln n - const`. A tenth of the negatives is as
    `ln(10) / s` less margin: this gives it back, and the target's mean probability stays. With
    `head.mhs.correction` the logits of the negatives have it already. At most `LARGEST_MARGIN`.
    """
    corrected = head.kind == "mhs" and head.mhs.correction
    seen = demand.classes if corrected else count_classes_seen(head, demand, groups)
    added = math.log(demand.classes / seen) / head.margin.scale
    why = (
        f"a sample meets {seen:,.0f} of {demand.classes:,} classes, so {added:.3f} more than the "
        f"{FULL_MARGIN} of a softmax over all of them"
    )
    if FULL_MARGIN + added > LARGEST_MARGIN:
        return LARGEST_MARGIN, f"{why}, but never more than {LARGEST_MARGIN}"
    return round(FULL_MARGIN + added, 3), why


def count_classes_seen(head: HeadConfig, demand: HeadDemand, groups: int) -> float:
    """Classes in the softmax of a sample, of a head with a row for each class."""
    if head.kind == "partial_fc":
        return max(1.0, head.partial_fc.rate * demand.classes)
    if head.kind != "mhs":
        return demand.classes
    return count_classes_met(head.mhs, demand, groups)


def auto_keys(head: HeadConfig) -> list[str]:
    """Which of `AUTO_KEYS` are `auto`, of those that the kind of head has."""
    kept = AUTO_KEYS if head.kind == "mhs" else (GROUPS_KEY, MARGIN_KEY)
    return [key for key, value in _values(head).items() if key in kept and value == AUTO]


def describe_sizes(keys: list[str], head: HeadConfig, why: str) -> str:
    """In a line, what some of `AUTO_KEYS` have become, and why."""
    numbers = _values(head)
    return f"auto: {', '.join(f'{key}={numbers[key]}' for key in keys)}: {why}"


def _values(head: HeadConfig) -> dict[str, float | Literal["auto"]]:
    """Those of `AUTO_KEYS`."""
    values = head.groups, head.mhs.length, head.mhs.extra_heads, head.margin.m
    return dict(zip(AUTO_KEYS, values, strict=True))


def choose_groups(head: HeadConfig, demand: HeadDemand) -> int:
    """G: fixed for the whole run, so as many as it may ever have workers, within reason.

    Batches belong to a run, and W divides its micro-batches n: a divisor of n that is a multiple of
    W gives every W that the run can have the same number of groups, as long as W divides it. More
    than four times the workers (or eight) are not chosen, because each group of `route` draws extra
    heads of its own. Nor does it get, beyond the workers, groups of fewer classes than a sample
    should meet, because there a sample's negatives are those of its group.
    """
    limit = max(FEWEST_GROUPS, SPARE_GROUPS * demand.workers)
    if head.kind == "mhs" and head.mhs.exchange == "route":
        limit = max(demand.workers, min(limit, demand.classes // _target(demand.classes)))
    multiples = range(demand.workers, limit + 1, demand.workers)
    return max((g for g in multiples if demand.micro_batches % g == 0), default=demand.workers)


def fill_sizes(head: HeadConfig, sizes: SizeChoice) -> HeadConfig:
    """The head's block with numbers where it had `auto`."""
    block, margin = head.mhs, head.margin
    if head.kind == "mhs":
        block = _fill_mhs(block, sizes.length, sizes.extra_heads)
    if margin.m == AUTO:
        margin = margin.model_copy(update={"m": sizes.margin})
    return head.model_copy(update={"groups": sizes.groups, "mhs": block, "margin": margin})


def _fill_mhs(mhs: MhsConfig, length: int, extra_heads: int) -> MhsConfig:
    return mhs.model_copy(update={"length": length, "extra_heads": extra_heads})


def resolve_sizes(config: Config, classes: int) -> Config:
    """The config with the numbers of the rule where its head has `auto`; a run is not asked."""
    sizes = choose_sizes(config.head, demand_of(config, classes))
    return config.model_copy(update={"head": fill_sizes(config.head, sizes)})


def count_classes_met(mhs: MhsConfig, demand: HeadDemand, groups: int) -> int:
    """Classes in the softmax of a sample with one label, as far as extra heads are other ones.

    With `batch` those of the heads that the images of a step may be expected to have, each drawn
    likewise.
    """
    length, extra = mhs.chosen_length, mhs.chosen_extra_heads
    if mhs.negatives == "own":
        return min(demand.classes, length)
    if mhs.negatives == "batch":
        heads = -(-demand.classes // length)
        drawn = demand.micro_batch * demand.micro_batches + extra
        return round(demand.classes * (1 - (1 - 1 / heads) ** drawn))
    reach = demand.classes if mhs.exchange == "gather" else demand.classes // groups
    return max(min(length, demand.classes), min(reach, length * (1 + extra)))


def _count_rows(head: HeadConfig, demand: HeadDemand) -> _Rows:
    """Routed samples are those of one micro-batch; gathered ones of the whole batch, shared."""
    element = 2 if head.bank.dtype == "bfloat16" else 4
    samples = float(demand.micro_batch * demand.labels)
    if head.mhs.exchange == "gather":
        samples *= demand.micro_batches / demand.workers
    budget = _budget(head, demand) / (demand.dim * element)
    return _Rows(demand.classes / demand.workers, budget, samples)


def _budget(head: HeadConfig, demand: HeadDemand) -> int:
    """Bytes of rows that a worker may meet in a forward pass."""
    return demand.micro_batch * BUDGET[demand.gpu and head.bank.memory == "device"]


def _target(classes: int) -> int:
    """Classes that a sample should meet."""
    return min(classes, MOST_MET, max(FEWEST_MET, classes // SHARE_MET))


def _choose_length(mhs: MhsConfig, demand: HeadDemand, groups: int, rows: _Rows) -> int:
    if mhs.length != AUTO:
        return mhs.length
    target = _target(demand.classes)
    per_sample = int(rows.budget / rows.samples)
    if mhs.negatives == "batch":
        images = demand.micro_batch * demand.micro_batches * demand.labels
        wanted = min(SHORT_LENGTH[1], max(GATHERED_LENGTH, target // images))
        return max(1, min(wanted, per_sample, demand.classes))
    alone = mhs.negatives == "own" or mhs.extra_heads == 0
    if mhs.extra_heads not in (AUTO, 0) and not alone:
        return max(1, target // (1 + mhs.chosen_extra_heads))
    if not alone and not _takes_long_heads(demand, groups, rows):
        shortest, longest = SHORT_LENGTH
        half = max(1, per_sample // 2)  # the other half is for the extra heads
        return min(demand.classes, longest, max(shortest, 1 << (half.bit_length() - 1)))
    length = _long_length(demand.classes, groups, target)
    if rows.own(length) > rows.budget:
        length = _long_length(demand.classes, groups, max(FEWEST_MET, per_sample))
    return length


def _takes_long_heads(demand: HeadDemand, groups: int, rows: _Rows) -> bool:
    """Whether one own head alone brings the wanted classes, or all of its group."""
    wanted = min(_target(demand.classes), demand.classes // groups)
    length = _long_length(demand.classes, groups, wanted)
    return wanted <= length and rows.own(length) <= rows.budget


def _long_length(classes: int, groups: int, wanted: int) -> int:
    """Classes of a long head: as wanted or more, up to `LONGEST` and to the group.

    Long heads are few: as many in each group, so that no worker has more than another.
    """
    size = classes / groups
    per_group = max(1, int(size / max(1, wanted)), math.ceil(size / LONGEST))
    return -(-classes // (groups * per_group))


def _choose_extra_heads(
    mhs: MhsConfig, demand: HeadDemand, groups: int, length: int, rows: _Rows
) -> int:
    """As many as lead to the wanted classes, within the budget, of those that there are."""
    if mhs.extra_heads != AUTO:
        return mhs.extra_heads
    target = _target(demand.classes)
    long = mhs.length == AUTO and _takes_long_heads(demand, groups, rows)
    if long or mhs.negatives != "own_plus":
        return 0
    heads, draws = -(-demand.classes // length), 1
    if mhs.exchange == "route":
        heads, draws = heads // groups, groups
    affordable = (rows.budget - rows.own(length)) * demand.workers / (draws * length)
    wanted = -(-target // length) - 1
    least = -(-FEWEST_MET // length) - 1
    return max(0, min(wanted, max(least, int(affordable)), heads - 1))


def _explain(head: HeadConfig, demand: HeadDemand, rows: _Rows, length: int, extra: int) -> str:
    rows_met = f"{rows.own(length):,.0f} rows that a worker meets in a forward pass"
    budget = f"the budget of {_budget(head, demand) / MIB:,.4g} MiB"
    if head.mhs.negatives == "batch":
        return f"all samples meet the heads of the batch, {length:,} classes each"
    if extra:
        return (
            f"a sample meets its own head of {length:,} classes and {extra:,} more, which all "
            f"samples of a group share, within {budget} of rows a forward pass"
        )
    fits = "fit" if rows.own(length) <= rows.budget else "exceed"
    return (
        f"a sample meets the {length:,} classes of its own head, whose rows learn in nearly every "
        f"step; the {rows_met} {fits} {budget}"
    )
