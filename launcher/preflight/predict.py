"""Whether a run would work and what it would cost, computed from what nodes and a trial report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from launcher.ray_cluster.elastic import group_size
from launcher.ray_cluster.environment import count_slots, placement_needs
from launcher.terminal.progress import format_duration
from mhe_dist.config.schema import Config
from mhe_dist.sizes import GIB, MIB

NodeReport = dict[str, Any]
"""What `probe_node` gives, and `resources`: what Ray counts on the node, by name."""


class CostPrediction(NamedTuple):
    """What a run would need.

    Attributes:
        parts: (name, bytes) of a worker's memory.
        memory: bytes of a worker's process at its peak.
        device: bytes of a worker's GPU; 0 on a CPU.
        step_s: seconds of a step; where the trial cannot tell, the least.
        longest_step_s: the most.
        steps: of an epoch; need not be whole.
        head: in a line, what `auto` has become and why; empty where nothing was `auto`.
    """

    parts: list[tuple[str, int]]
    memory: int
    device: int
    step_s: float
    longest_step_s: float
    steps: float
    head: str = ""


def find_obstacles(config: Config, nodes: list[NodeReport]) -> list[str]:
    """Every reason, in a sentence with its cure, why the run cannot work on these nodes."""
    return [*_unreachable(nodes), *_disagreements(nodes), *_too_few(config, nodes)]


def as_it_would_run(config: Config, nodes: list[NodeReport]) -> Config:
    """The config with the workers that an elastic run gets on these nodes, and no more or fewer.

    Args:
        config: of the run; `find_obstacles` found nothing.
        nodes: all of them.
    """
    if not config.scale.elastic:
        return config
    group = {"workers": group_size(_room(config, nodes), config), "min_workers": 0}
    return config.model_copy(update={"scale": config.scale.model_copy(update=group)})


def workers_per_node(config: Config, nodes: list[NodeReport]) -> int:
    """Workers on the fullest node; packed, Ray fills a node before it goes to the next.

    Args:
        config: see `as_it_would_run`.
        nodes: all of them.
    """
    scale = config.scale
    spread = math.ceil(scale.workers / len(nodes))
    if scale.placement in ("spread", "strict_spread"):
        return spread
    return max(spread, min(scale.workers, max(worker_slots(config, node) for node in nodes)))


def predict_cost(config: Config, measured: dict[str, Any]) -> CostPrediction:
    """Memory and time of each worker.

    The counted parts say what the memory is for. The peak is that of the trial, plus the rows that
    the trial did not touch, plus what a checkpoint copies beyond what the backward pass needs. Of a
    GPU's worker, all rows are on the card or pinned when the trial begins, and what the backward
    pass needs is not on the host.

    A step takes as long as it took all workers of a node in the trial. A head that scores the
    embeddings of all workers takes longer, by those that were not in the trial at most: that much
    if all of its time is in products with embeddings.

    Args:
        config: see `as_it_would_run`.
        measured: what `pipelines.pretrain.dry_run` gives.
    """
    counted, trial = measured["footprint"], measured["trial"]
    libraries = ("libraries", trial["base_bytes"])
    parts = [libraries, *((name, size) for name, size in counted.items() if size)]
    copies = counted["weights"] + counted["optimizer"] + counted["rows"]
    if config.scale.gpu:
        memory = trial["peak_bytes"] + copies
    else:
        rows = max(0, counted["rows"] - trial["rows_bytes"])
        memory = trial["peak_bytes"] + rows + max(0, copies - counted["activations"])
    step = trial["step_s"]
    growth = config.scale.workers / measured["workers"] - 1 if config.head.gathers else 0.0
    return CostPrediction(
        parts,
        memory,
        trial["device_bytes"],
        step_s=step,
        longest_step_s=step + growth * trial["head_s"],
        steps=measured["samples"] / config.train.global_batch,
        head=measured.get("head", ""),
    )


def find_shortages(
    config: Config, prediction: CostPrediction, nodes: list[NodeReport]
) -> list[str]:
    """Why the predicted memory does not fit, and what would have to change.

    Args:
        config: see `as_it_would_run`.
        prediction: of that config.
        nodes: all of them.
    """
    return [*_short_memory(config, prediction, nodes), *_small_cards(prediction, nodes)]


def _small_cards(prediction: CostPrediction, nodes: list[NodeReport]) -> Iterable[str]:
    """Cards that hold less than a worker needs; what a driver does not tell is not judged."""
    sizes = {gpu: card_bytes(gpu) for node in nodes for gpu in node["gpus"]}
    small = [gpu for gpu, size in sizes.items() if size and size < prediction.device]
    if small:
        yield (
            f"a worker needs {_gib(prediction.device)} on its GPU, which is more than there is on "
            f"{'; '.join(small)}: lower train.micro_batch or data.image_size, set "
            "head.bank.memory=host, head.bank.dtype=bfloat16 or scale.zero_stage=2, or use more "
            "workers"
        )


def card_bytes(gpu: str) -> int:
    """Bytes of a card from what its driver says, "NAME, 81559 MiB"; 0 if it does not say."""
    found = re.search(r"(\d+) MiB$", gpu)
    return int(found[1]) * MIB if found else 0


def _short_memory(config: Config, prediction: CostPrediction, nodes: list[NodeReport]) -> list[str]:
    crowd = workers_per_node(config, nodes)
    there = min(node["memory"] for node in nodes)
    if crowd * prediction.memory <= there:
        return []
    spread = math.ceil(config.scale.workers / len(nodes)) < crowd
    largest = max(prediction.parts[1:], key=lambda part: part[1], default=("", 0))[0]
    return [
        f"{crowd} workers on a node need {_gib(crowd * prediction.memory)}, and "
        f"{_gib(there)} are free. Most of a worker's own memory is {largest}: {_cure(largest)}"
        f"{', or set scale.placement=spread' if spread else ''}."
    ]


def prediction_rows(prediction: CostPrediction) -> Iterable[tuple[str, str]]:
    """The prediction as lines of a table."""
    for name, size in prediction.parts:
        yield f"memory: {name}", _gib(size)
    yield "memory of a worker at its peak", _gib(prediction.memory)
    if prediction.device:
        yield "memory of its GPU at its peak", _gib(prediction.device)
    bounds = sorted({prediction.step_s, prediction.longest_step_s})
    yield "time of a step", " to ".join(f"{step:.3f}" for step in bounds) + " s"
    epochs = (format_duration(step * prediction.steps) for step in bounds)
    yield "time of an epoch", " to ".join(epochs)


def _unreachable(nodes: list[NodeReport]) -> Iterable[str]:
    """What nodes cannot reach; the same trouble of several nodes once."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        for key, message in node["problems"]:
            found.setdefault((key, message), []).append(node["host"])
    for (key, message), hosts in found.items():
        where = "" if len(nodes) == 1 else f" (on {_listed(hosts, len(nodes))})"
        yield f"{key}: {message}{where}"


def _disagreements(nodes: list[NodeReport]) -> Iterable[str]:
    """Packages that are missing, or of several versions."""
    names = {"python": [node["python"] for node in nodes]}
    for package in nodes[0]["versions"]:
        names[package] = [node["versions"][package] for node in nodes]
    for name, versions in names.items():
        hosts = [node["host"] for node, version in zip(nodes, versions, strict=True) if not version]
        if hosts:
            yield f"{name} is missing on {_listed(hosts, len(nodes))}: install it there"
        elif len(set(versions)) > 1:
            listed = ", ".join(
                f"{version} on {node['host']}"
                for version, node in dict(zip(versions, nodes, strict=True)).items()
            )
            yield f"{name} is not the same on all nodes ({listed}): install one version"


def _too_few(config: Config, nodes: list[NodeReport]) -> Iterable[str]:
    """Whether Ray would wait for ever for room."""
    scale, room = config.scale, _room(config, nodes)
    fewest = min(config.group_sizes()) if scale.elastic else scale.workers
    if room < fewest:
        wants = ", ".join(f"{name} {amount:g}" for name, amount in placement_needs(config).items())
        key = "scale.min_workers" if scale.elastic else "scale.workers"
        needs = f", and a step can be shared by {fewest} at least" if fewest > scale.fewest else ""
        yield (
            f"{key}={scale.fewest}: there is room for {room}, each with {wants}, "
            f"on {len(nodes)} nodes{needs}. Lower {key}, scale.cpus_per_worker or "
            "scale.resources, or add nodes."
        )


def _room(config: Config, nodes: list[NodeReport]) -> int:
    return sum(worker_slots(config, node) for node in nodes)


def worker_slots(config: Config, node: NodeReport) -> int:
    """How many workers have room on a node."""
    return count_slots(node["resources"], placement_needs(config))


def _cure(part: str) -> str:
    return {
        "activations": "lower train.micro_batch or data.image_size",
        "rows": "set head.bank.memory=file or head.bank.dtype=bfloat16, or use more workers",
        "optimizer": "set scale.zero_stage=2, or use more workers",
    }.get(part, "use a smaller backbone, or fewer workers on a node")


def _listed(hosts: list[str], total: int) -> str:
    return "every node" if len(hosts) == total else ", ".join(hosts)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size > 0.1 * GIB else f"{size / MIB:.1f} MiB"
