"""Whether a run would work and what it would cost, computed from what nodes and a trial report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from launcher.ray_cluster.elastic import explain_no_room, group_size
from launcher.ray_cluster.environment import count_room, count_slots, placement_needs
from launcher.terminal.progress import format_duration
from mhe_dist.config.schema import Config
from mhe_dist.errors import counted
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
    no_room = explain_no_room(config, _resources(nodes))
    return [*_unreachable(nodes), *_disagreements(nodes), *([no_room] if no_room else [])]


def as_it_would_run(config: Config, nodes: list[NodeReport]) -> Config:
    """The config with the workers that an elastic run gets on these nodes, and no more or fewer.

    Args:
        config: of the run; `find_obstacles` found nothing.
        nodes: all of them.
    """
    if not config.scale.elastic:
        return config
    workers = group_size(count_room(config, _resources(nodes)), config)
    return _with_scale(config, workers=workers, min_workers=0)


def workers_on_nodes(config: Config, nodes: list[NodeReport]) -> list[int]:
    """The most workers that each node may get; packed, Ray fills one before it goes to the next.

    Args:
        config: see `as_it_would_run`.
        nodes: all of them.
    """
    needs, workers = placement_needs(config), config.scale.workers
    slots = [min(workers, count_slots(node["resources"], needs)) for node in nodes]
    if config.scale.placement == "strict_pack":
        return [room if room == workers else 0 for room in slots]
    if config.scale.placement == "strict_spread":
        return [min(1, room) for room in slots]
    return _spread(slots, workers) if config.scale.placement == "spread" else slots


def _spread(slots: list[int], workers: int) -> list[int]:
    """Workers on each node if they are on as many nodes as have room for them."""
    for highest in range(1, workers + 1):
        level = [min(highest, room) for room in slots]
        if sum(level) >= workers:
            return level
    return slots


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
    return [*_short_memory(config, prediction, nodes), *_small_cards(config, prediction, nodes)]


def _small_cards(
    config: Config, prediction: CostPrediction, nodes: list[NodeReport]
) -> Iterable[str]:
    """Cards that hold less than a worker needs; what a driver does not tell is not judged."""
    crowds = workers_on_nodes(config, nodes)
    used = [node for node, crowd in zip(nodes, crowds, strict=True) if crowd]
    sizes = {gpu: card_bytes(gpu) for node in used for gpu in node["gpus"]}
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


def _short_memory(
    config: Config, prediction: CostPrediction, nodes: list[NodeReport]
) -> Iterable[str]:
    crowds = workers_on_nodes(config, nodes)
    crowd, node = max(
        zip(crowds, nodes, strict=True),
        key=lambda pair: pair[0] * prediction.memory - pair[1]["memory"],
    )
    if crowd * prediction.memory <= node["memory"]:
        return
    spread = max(workers_on_nodes(_with_scale(config, placement="spread"), nodes))
    largest = max(prediction.parts[1:], key=lambda part: part[1], default=("", 0))[0]
    yield (
        f"{counted(crowd, 'worker')} on {node['host']} need{'s' * (crowd == 1)} "
        f"{_gib(crowd * prediction.memory)}, and {_gib(node['memory'])} are free there. "
        f"Most of a worker's own memory is {largest}: {_cure(largest)}"
        f"{', or set scale.placement=spread' if spread < crowd else ''}."
    )


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


def _resources(nodes: list[NodeReport]) -> list[dict[str, float]]:
    return [node["resources"] for node in nodes]


def _with_scale(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"scale": config.scale.model_copy(update=changes)})


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
