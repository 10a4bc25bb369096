"""Heads on the device against themselves on a CPU in float64, over everything that varies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import CPU, Topology
from mhe_dist.engine.settings import set_float_kernels
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings

CLASSES, WIDTH, BATCH, STEPS, LR = 3000, 48, 32, 3, 0.05


def head_variants(length: int, extra_heads: int) -> dict[str, dict[str, Any]]:
    """The config of every head by the name that measurements give it; L and m are those of mhs."""
    mhs = {"length": length, "extra_heads": extra_heads}
    return {
        "route": {"kind": "mhs", "mhs": mhs},
        "gather": {"kind": "mhs", "mhs": mhs | {"exchange": "gather", "negatives": "batch"}},
        "partial_fc": {"kind": "partial_fc"},
        "full": {"kind": "full"},
        "mhp": {"kind": "mhp"},
        "mhc": {"kind": "mhc"},
    }


def _special_variants() -> dict[str, dict[str, Any]]:
    """Heads that compute something else than `HEADS`; see `labels_of` and `tf32_of`."""
    route, gather = HEADS["route"], HEADS["gather"]
    several = {"objective": "multi_label"}
    return {
        "route own": route | {"mhs": route["mhs"] | {"negatives": "own"}},
        "route correction": route | {"mhs": route["mhs"] | {"correction": True}},
        "route several labels": route,
        "route multi_label": route | several,
        "gather several labels": gather,
        "full multi_label": HEADS["full"] | several,
        "route tf32": route,
        "route several labels tf32": route,
    }


HEADS: Final = head_variants(length=16, extra_heads=6)
SPECIAL: Final = _special_variants()
MARGINS: Final[dict[str, dict[str, Any]]] = {
    "cosface": {"kind": "cosface"},
    "none": {"kind": "none"},
    "softmax": {"kind": "softmax"},
    "arcface": {"kind": "arcface"},
    "combined": {"kind": "combined", "m1": 1.1, "m2": 0.2, "m3": 0.1},
    "adaface": {"kind": "adaface"},
    "filter": {"kind": "cosface", "filter": 0.4},
}
BANKS: Final = tuple(product(("device", "host", "file"), ("float32", "bfloat16")))
OPTIMIZERS: Final = ("sgd", "adamw")
# The rounding to bfloat16 follows the last bits of float32, so some values fall the other way.
TOLERANCES: Final = {"float32": 3e-4, "bfloat16": 5e-3, "tf32": 5e-2}


class HeadTrace(NamedTuple):
    """What some steps of a head led to, on the host: losses, embeddings' gradients, tensors."""

    losses: Tensor
    gradients: Tensor
    state: dict[str, Tensor]


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Compare every head; a check for each head and margin, the worst of its banks."""
    set_float_kernels("float32")
    worst = {"loss": 0.0, "gradient": 0.0, "rows": 0.0}
    pairs = list(product(HEADS, MARGINS))
    pairs = pairs[::3] if settings.small else pairs
    pairs += [(head, "cosface") for head in SPECIAL]
    for number, (head, margin) in enumerate(pairs):
        name = f"{head} {margin}"
        with found.attempt(name):
            excess = []
            for memory, dtype, optimizer in _variants(settings, number, head):
                config = head_config(head, margin, memory, dtype, optimizer)
                errors = differences(config, settings, labels_of(head), tf32_of(head))
                limit = TOLERANCES["tf32" if tf32_of(head) else dtype]
                excess += [
                    f"{memory} {dtype} {optimizer}: {what} differs by {error:.1e}"
                    for what, error in errors.items()
                    if not error <= limit
                ]
                if dtype == "float32" and not tf32_of(head):
                    worst = {what: max(worst[what], error) for what, error in errors.items()}
            found.check(name, not excess, "; ".join(excess))
    for what, error in worst.items():
        found.figure(f"largest difference of {what}, float32 banks", error, "relative")


def labels_of(head: str) -> int:
    """How many labels samples have at most; 0: one, without a dimension of its own."""
    return 3 if "label" in head else 0


def tf32_of(head: str) -> bool:
    """Whether a GPU computes the products in TF32, as in bf16 runs."""
    return head.endswith("tf32")


def head_config(
    head: str, margin: str, memory: str, dtype: str, optimizer: str, groups: int = 4
) -> HeadConfig:
    """A small head, one of `HEADS` or `SPECIAL`."""
    blocks = {"memory": memory, "dtype": dtype}
    values = (HEADS | SPECIAL)[head] | {"margin": MARGINS[margin], "bank": blocks}
    values |= {"groups": groups}
    return HeadConfig.model_validate(values | {"optim": {"kind": optimizer}})


def differences(
    config: HeadConfig, settings: GpuSettings, labels: int, tf32: bool
) -> dict[str, float]:
    """Relative differences between the device in float32 and a CPU in float64, by what differs."""
    device = run_head(
        *(config, settings.torch_device, torch.float32, settings.folder / "device", labels, tf32)
    )
    plain = run_head(config, CPU, torch.float64, settings.folder / "plain", labels)
    rows = [relative(device.state[name], tensor) for name, tensor in plain.state.items()]
    return {
        "loss": relative(device.losses, plain.losses),
        "gradient": relative(device.gradients, plain.gradients),
        "rows": max(rows),
    }


def run_head(
    config: HeadConfig,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    size: int = 0,
    tf32: bool = False,
) -> HeadTrace:
    """Some steps of a head, the same labels (see `labels_of`) and embeddings on any device."""
    spec = HeadSpec(config, CLASSES, WIDTH, 0, 1, dtype, folder, tf32=tf32)
    head = build_head(spec, Topology(device=device))
    random = torch.Generator().manual_seed(1)
    losses, gradients = [], []
    labels = random_labels((STEPS, 1, BATCH), size, random)
    inputs = torch.randn(STEPS, BATCH, WIDTH, generator=random)
    for step in range(STEPS):
        head.plan(step, labels[step])
        if step + 1 < STEPS:
            head.prefetch(step + 1, labels[step + 1])
        embeddings = inputs[step].to(device, dtype).requires_grad_()
        output = head(embeddings, labels[step, 0])
        output.loss.backward()
        head.step(LR)
        assert embeddings.grad is not None
        losses.append(output.loss.detach().double().cpu())
        gradients.append(embeddings.grad.double().cpu())
    state = {name: tensor.double().cpu() for name, tensor in head.state().tensors.items()}
    return HeadTrace(torch.stack(losses), torch.stack(gradients), state)


def random_labels(shape: tuple[int, ...], size: int, random: torch.Generator) -> Tensor:
    """Labels of that shape, or lists of up to `size` of them, some of them empty."""
    if not size:
        return torch.randint(0, CLASSES, shape, generator=random)
    lists = torch.randint(-CLASSES // 2, CLASSES, (*shape, size), generator=random)
    return lists.clamp(min=-1)


def relative(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of what is expected."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.double().norm()
    return float((found.double() - expected.double()).norm() / scale.clamp_min(1e-30))


def _variants(settings: GpuSettings, number: int, head: str) -> Iterator[tuple[str, str, str]]:
    """Bank memory, its type and the optimizer: all on a GPU, in small one after the other."""
    optimizers = OPTIMIZERS if head in HEADS else OPTIMIZERS[:1]
    everything = [(*bank, optimizer) for bank in BANKS for optimizer in optimizers]
    if not settings.small:
        yield from everything
        return
    yield everything[number % len(everything)]
