"""A first YAML for a user's data: head, lengths, groups, batches, and why, in its comments."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import yaml

from launcher.preflight.own_data import OwnData
from mhe_dist.config.auto.head_sizes import (
    MOST_CLASSES_OF_FULL,
    HeadDemand,
    SizeChoice,
    choose_kind,
    choose_sizes,
    count_classes_met,
    fill_sizes,
)
from mhe_dist.config.head import BankConfig, HeadConfig
from mhe_dist.sizes import GIB

_STREAMS: Final = 64
_STEPS: Final = 2_000  # that even a small set is trained for, within the bounds of the epochs
_FEWEST_STEPS_PER_EPOCH: Final = 8
_WIDTH: Final = 100
_ROWS_GIB: Final = {True: 20, False: 4}  # rows and momentum that fit a worker: GPU, CPU


class Machine(NamedTuple):
    """What the run is for: its workers, whether each has a GPU, the CPUs of each."""

    workers: int
    gpu: bool
    cpus_per_worker: int = 1


class Setting(NamedTuple):
    """A key of a section, its value, and why it has that value."""

    key: str
    value: Any
    why: str = ""


Sections = dict[str, list[Setting]]


def write_first_config(data: OwnData, machine: Machine, name: str, header: Sequence[str]) -> str:
    """The YAML of a run.

    Args:
        data: what there is to train on.
        machine: that the run is for.
        name: of the run.
        header: lines of the comment at its top.
    """
    lines = [f"# {line}".rstrip() for line in header]
    for section, settings in choose_settings(data, machine, name).items():
        lines += ["", f"{section}:"]
        for setting in settings:
            wrapped = textwrap.wrap(setting.why, _WIDTH - 4, break_on_hyphens=False)
            lines += [f"  # {line}" for line in wrapped]
            lines.append(f"  {setting.key}: {_flow(setting.value)}")
    return "\n".join([*lines, ""])


def choose_settings(data: OwnData, machine: Machine, name: str) -> Sections:
    """Values for data and machine, section by section, each with its reason."""
    batch = choose_batch(data.images, machine)
    epochs = _epochs(data.images, batch, machine)
    steps = math.ceil(data.images * epochs / batch.global_batch)
    side, why_side = _image_size(data.side, machine.gpu)
    sections: Sections = {
        "run": [Setting("name", name, "The same name goes on with the same run.")],
        "data": _data(data, batch, side, why_side, machine),
        "model": _model(machine.gpu, side),
    }
    dim = next(setting.value for setting in sections["model"] if setting.key == "embedding_dim")
    sections |= {
        "head": choose_head(data.classes, dim, machine, batch),
        "optim": _optim(batch, steps, machine.gpu),
        "train": _train(data, batch, epochs, steps),
        "scale": _scale(machine),
    }
    every = max(50, 10 * round(steps / 80)) if steps else 500
    if data.heldout and data.same_classes:
        why = "Other images of the training's classes: the head names them, after so many steps."
        sections["evaluate"] = [
            Setting("classification", data.heldout, why),
            Setting("every_steps", every),
        ]
    elif data.heldout:
        why = "Classes that training never sees, looked up after so many steps and at the end."
        sections["evaluate"] = [
            Setting("shards", data.heldout, why),
            Setting("every_steps", every),
        ]
    sections["checkpoint"] = [
        Setting("every_steps", every, "What an interrupted run loses at most.")
    ]
    return sections


class BatchPlan(NamedTuple):
    """Images per step and per forward pass, and the number of streams."""

    global_batch: int
    micro_batch: int
    streams: int


def choose_batch(images: int, machine: Machine) -> BatchPlan:
    """Batches that fit workers and data: micro-batches, workers and streams divide one another.

    Args:
        images: of an epoch; 0: unknown, and taken for many.
        machine: its workers each take one micro-batch of a step.
    """
    micro = 128 if machine.gpu else max(8, 256 // 2 ** math.ceil(math.log2(machine.workers + 1)))
    while images and micro > 1 and micro * machine.workers * _FEWEST_STEPS_PER_EPOCH > images:
        micro //= 2
    per_worker = 2 ** int(math.log2(max(1, min(micro, _STREAMS / machine.workers))))
    return BatchPlan(micro * machine.workers, micro, machine.workers * per_worker)


def choose_head(classes: int, dim: int, machine: Machine, batch: BatchPlan) -> list[Setting]:
    """The head and its sizes, by the rule that stands behind `auto`, too.

    Args:
        classes: C.
        dim: D, the width of the embedding.
        machine: its workers own the rows.
        batch: what a step has.
    """
    rows = classes * dim * 8 / machine.workers / GIB
    memory = "device"
    if rows > _ROWS_GIB[machine.gpu]:
        memory = "host" if machine.gpu else "file"
    kind = choose_kind(classes)
    micro_batches = batch.global_batch // batch.micro_batch
    demand = HeadDemand(
        classes, dim, machine.workers, batch.micro_batch, micro_batches, machine.gpu
    )
    head = HeadConfig(kind=kind, bank=BankConfig(memory=memory))
    sizes = choose_sizes(head, demand)
    margin = {"kind": "cosface", "scale": 32, "m": 0.3}
    margin_why = "Cosines times scale, less m for the own class: m makes the classes compact."
    if kind == "full":
        why = (
            f"full: a softmax over all {classes:,} classes. Up to {MOST_CLASSES_OF_FULL:,} no "
            "head that sees a part of them finds more, beyond what seeds do (docs/choosing.md), "
            "and its cost is small beside the backbone's. Above, take mhs."
        )
        settings = [Setting("kind", "full", why)]
    else:
        margin = {"kind": "cosface", "scale": 64, "m": 0.4}
        settings = _sampled_head(fill_sizes(head, sizes), demand, sizes)
    why_groups = f"{sizes.why_groups[0].upper()}{sizes.why_groups[1:]}."
    settings += [
        Setting("groups", sizes.groups, why_groups),
        Setting("margin", margin, margin_why),
    ]
    if memory != "device":
        where = "memory of the host" if machine.gpu else "files, which the system pages"
        why = (
            f"Rows and momentum are {rows:,.0f} GiB of each worker: they are kept in {where}, and "
            "those of the next batch are fetched while the backbone works."
        )
        settings.append(Setting("bank", {"memory": memory}, why))
    return settings


def _sampled_head(head: HeadConfig, demand: HeadDemand, sizes: SizeChoice) -> list[Setting]:
    seen = count_classes_met(head.mhs, demand, sizes.groups)
    why = (
        f"mhs: each sample is compared with {seen:,} of {demand.classes:,} classes. A step's cost "
        "follows from the batch and these, and not from the number of classes; full would compare "
        "with all of them."
    )
    why_sizes = (
        f"{sizes.why_sizes[0].upper()}{sizes.why_sizes[1:]}. Left out, it is auto: the same."
    )
    numbers = {"length": sizes.length, "extra_heads": sizes.extra_heads}
    return [Setting("kind", "mhs", why), Setting("mhs", numbers, why_sizes)]


def _data(
    data: OwnData, batch: BatchPlan, side: int, why_side: str, machine: Machine
) -> list[Setting]:
    augment = {"flip": 0.5, "crop": 0.1, "brightness": 0.2, "contrast": 0.2}
    why_augment = "Random changes of training images. No flip where left and right matter."
    why_streams = (
        f"Samples of a step come from so many places of the data; {batch.streams} divides the "
        "batch, and the micro-batches of a step divide it."
    )
    settings = [
        Setting("shards", data.shards),
        *_clustered(data.labels),
        Setting("image_size", side, why_side),
        Setting("streams", batch.streams, why_streams),
    ]
    if machine.gpu:
        workers = max(1, min(4, machine.cpus_per_worker - 1))
        settings.append(
            Setting("loader_workers", workers, "Processes that decode, for each worker.")
        )
    return [*settings, Setting("augment", augment, why_augment)]


def _clustered(labels: str) -> list[Setting]:
    """The classes that clustering makes of images that have none; nothing for other images."""
    if not labels:
        return []
    why = "The classes that mhe cluster makes; name those of the next round here."
    why_several = "An image between classes has several of them, 8 at most (docs/unlabelled.md)."
    return [Setting("labels", labels, why), Setting("labels_per_sample", 8, why_several)]


def _image_size(found: int, gpu: bool) -> tuple[int, str]:
    """Side of the training images, and why."""
    largest = 224 if gpu else 64
    side = min(largest, max(32, found - found % 16)) if found else min(largest, 112)
    have = f"The images have about {found} pixels. " if found else ""
    if found <= side:
        return side, f"{have}Larger ones are scaled down, smaller ones up."
    dearer = "Twice the side costs four times as much."
    return side, f"{have}{side} is what a {'GPU' if gpu else 'CPU'} trains in good time. {dearer}"


def _model(gpu: bool, side: int) -> list[Setting]:
    if gpu and side == 112:
        why = "The network of face recognition, made for 112 pixels."
        return [
            Setting("name", "iresnet50", why),
            Setting("embedding_dim", 512),
            Setting("neck", "none", "An IResNet ends with a BatchNorm of its own."),
        ]
    if gpu:
        return [
            Setting("name", "resnet50", "Any model of timm; timm.list_models() names them."),
            Setting("embedding_dim", 512),
        ]
    why = "A small ResNet, for CPU cores; on GPUs take resnet50 or iresnet50."
    return [
        Setting("name", "resnet10t", why),
        Setting("kwargs", {"channels": [32, 64, 128, 256]}),
        Setting("embedding_dim", 128),
    ]


def _optim(batch: BatchPlan, steps: int, gpu: bool) -> list[Setting]:
    rate = float(f"{0.2 * math.sqrt(batch.global_batch / 128):.1g}") if not gpu else 0.1
    why = "Grows with the root of the batch. If the loss does not fall, halve it."
    warmup = max(10, min(500, steps // 20)) if steps else 500
    return [
        Setting("lr", rate, "The usual rate of face recognition." if gpu else why),
        Setting("warmup_steps", warmup, "The rate grows over these, while the rows are fresh."),
    ]


def _train(data: OwnData, batch: BatchPlan, epochs: int, steps: int) -> list[Setting]:
    passes = batch.global_batch // batch.micro_batch
    why = (
        f"{data.images:,} images in steps of {batch.global_batch} are {steps:,} steps."
        if data.images
        else "How many steps that is, the shards will say."
    )
    why_batch = (
        f"{passes} forward passes of micro_batch images: one for each worker. Both stay the same "
        "on other numbers of workers, and so does the result."
    )
    return [
        Setting("epochs", epochs, why),
        Setting("global_batch", batch.global_batch, why_batch),
        Setting("micro_batch", batch.micro_batch),
    ]


def _epochs(images: int, batch: BatchPlan, machine: Machine) -> int:
    if not images:
        return 20
    wanted = _STEPS * batch.global_batch / images
    return round(min(60, max(20 if machine.gpu else 10, wanted)))


def _scale(machine: Machine) -> list[Setting]:
    if not machine.gpu:
        why = "ZeRO cuts the optimizer's state, which is small here, and steps take a third longer."
        return [
            Setting("workers", machine.workers, "One for each core of the machine, at most 8."),
            Setting("zero_stage", 0, why),
        ]
    return [
        Setting("workers", machine.workers, "One for each GPU."),
        Setting("gpu", True),
        Setting("cpus_per_worker", machine.cpus_per_worker),
    ]


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True
    )
    return str(text).removesuffix("\n").removesuffix("\n...")
