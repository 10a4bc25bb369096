"""How many workers a run gets: the largest number that is there and divides the micro-batches.

And what a run that has none yet waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from launcher.events import Event
from launcher.ray_cluster.environment import count_room, placement_needs
from mhe_dist.config.schema import Config
from mhe_dist.errors import counted

RESIZE_CHECK_S = 30.0  # how often a running group looks for room to grow into
RESIZE_EVERY_S = 300.0  # a group leaves for a larger one no more often: each has to start and load
_PAUSES_S = (5.0, 20.0, 60.0)  # before the restart after the first, second, later failures in a row
LONG_WAIT_S = 60.0
_ASK_EVERY_S = 5.0
_NODES_NAMED = 8


def group_size(available: int, config: Config) -> int:
    """How many workers to use of `available`; 0 if those are fewer than the run needs."""
    fitting = [size for size in config.group_sizes() if size <= available]
    return max(fitting, default=0)


def pause_before_restart(failures: int, announce: Callable[[str], None]) -> None:
    """Let pass what made a group fail, such as an outage of a store, for up to a minute.

    Args:
        failures: in a row.
        announce: called with what the run waits for.
    """
    pause = _PAUSES_S[min(failures, len(_PAUSES_S)) - 1]
    announce(f"starting again in {pause:.0f} s, after failure {failures} without a new checkpoint")
    time.sleep(pause)


class NodeRoom(NamedTuple):
    """What a living node of a cluster has, by Ray's names, and what of it is free."""

    host: str
    total: Mapping[str, float]
    free: Mapping[str, float]


class LongWait:
    """Says once a minute what a run waits for, as long as no worker trains.

    Args:
        trains: whether a worker trains; asked every few seconds.
        describe: what to say; called only when it is said.
        clock: in seconds.
    """

    def __init__(
        self,
        trains: Callable[[], bool],
        describe: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trains, self._describe, self._clock = trains, describe, clock
        self._since = self._checked = clock()

    def events(self) -> list[Event]:
        """The event to hand on now, if there is one."""
        now = self._clock()
        if now - self._checked < _ASK_EVERY_S:
            return []
        self._checked = now
        if self._trains():
            self._since = now
        if now - self._since < LONG_WAIT_S:
            return []
        self._since = now
        return [{"event": "waiting", "what": self._describe()}]


def describe_wait(config: Config, nodes: list[NodeRoom]) -> str:
    """What a run without workers asks of the cluster, and what its nodes have free."""
    needs, fewest = placement_needs(config), min(config.group_sizes())
    free = count_room(config, (node.free for node in nodes))
    ever = count_room(config, (node.total for node in nodes))
    workers = f"{'at least ' * config.scale.elastic}{fewest} worker{'s' * (fewest > 1)}"
    parts = [
        f"still waiting for {workers}, each with {_amounts(needs, needs)}: there is room for "
        f"{free} now, for {ever} when nothing else runs",
        *(
            f"{node.host} has {_amounts(node.free, needs)} free of {_amounts(node.total, needs)}"
            for node in nodes[:_NODES_NAMED]
        ),
    ]
    if len(nodes) > _NODES_NAMED:
        parts.append(f"and {len(nodes) - _NODES_NAMED} nodes more")
    if free >= fewest:
        parts.append("so they are starting, or Ray holds the room for others: see ray status")
    elif ever >= fewest:
        parts.append("mhe jobs lists what else runs there")
    else:
        parts.append("lower scale.workers or what each needs, or add nodes")
    return "; ".join(parts)


def explain_no_room(config: Config, nodes: Sequence[Mapping[str, float]]) -> str:
    """Why Ray would wait for ever on these nodes, and the cure; empty: there is room.

    Args:
        config: of the run.
        nodes: what each one has, by Ray's names.
    """
    scale, room = config.scale, count_room(config, nodes)
    # Of all trials of a sweep together, no step need be shared by so many.
    fewest = min(config.group_sizes(), default=scale.fewest)
    if room >= fewest:
        return ""
    key = "scale.min_workers" if scale.elastic else "scale.workers"
    needs = placement_needs(config)
    placed = scale.placement.partition("strict_")[2]
    return "".join(
        (
            f"{key}={scale.fewest}: there is room for {room}, each with {_amounts(needs, needs)}, ",
            f"on {counted(len(nodes), 'node')}",
            f" with scale.placement=strict_{placed}" if placed else "",
            f", and a step can be shared by {fewest} at least" if fewest > scale.fewest else "",
            f". Lower {key}, scale.cpus_per_worker or scale.resources, ",
            "set scale.gpu=false, " if scale.gpu else "",
            f"set scale.placement={placed}, " if placed else "",
            "or add nodes.",
        )
    )


def _amounts(has: Mapping[str, float], names: Mapping[str, float]) -> str:
    """Amounts of some resources, as "CPU 1, GPU 0"."""
    return ", ".join(f"{name} {has.get(name, 0.0):g}" for name in names)
