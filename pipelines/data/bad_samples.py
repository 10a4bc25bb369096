"""Bad samples: how many a run tolerates, and their record over all ranks and restarts of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch.distributed as dist

from mhe_dist.config.data import DataConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from mhe_dist.redact import scrub_urls
from pipelines.shards.index import Fault
from pipelines.storage.urls import atomic_write

log = logging.getLogger(__name__)

BAD_SAMPLES_FILE: Final = "bad_samples.jsonl"
MAX_NAMED: Final = 1000
"""How many bad samples are kept by name at most."""


@dataclass
class BadSampleTally:
    """The bad samples among those that were drawn.

    Attributes:
        seen: samples drawn so far, good or bad.
        count: bad ones among them; a sample counts each time it is drawn.
        samples: location of a bad sample -> what is wrong with it, without secrets of URLs; the
            first `MAX_NAMED` of them.
    """

    seen: int = 0
    count: int = 0
    samples: dict[str, str] = field(default_factory=dict)

    def add(self, seen: int, faults: Iterable[Fault]) -> None:
        """Add the faults found among `seen` samples, and log those at new locations."""
        self.seen += seen
        for fault in faults:
            self.count += 1
            # Each rank has its own environment; what a URL holds is the same for all.
            location, reason = map(scrub_urls, fault)
            if location not in self.samples and len(self.samples) < MAX_NAMED:
                log.warning("bad sample: %s: %s", location, reason)
                self.samples[location] = reason

    def merge(self, other: BadSampleTally) -> None:
        """Add the counts and names of another tally."""
        self.seen += other.seen
        self.count += other.count
        for location, reason in other.samples.items():
            if len(self.samples) < MAX_NAMED:
                self.samples.setdefault(location, reason)

    def check(self, data: DataConfig, epoch: int) -> None:
        """Enforce the rule of the config; `epoch` is the number of samples of an epoch.

        Raises:
            RunError: there is a bad sample and none is allowed, or there are too many.
        """
        if not self.count:
            return
        last = ": ".join(next(reversed(self.samples.items())))
        if data.on_bad_sample == "fail":
            raise RunError(f"{last}; data.on_bad_sample=skip would go on without it")
        of = max(self.seen, epoch)
        if self.count > data.max_bad_fraction * of:
            raise RunError(
                f"{self.count} bad samples, more than data.max_bad_fraction="
                f"{data.max_bad_fraction} of {of}; the last named: {last}"
            )


class BadSamples:
    """The bad samples of a run: those of all ranks, and those before a restart.

    Attributes:
        total: what `gather` found; the same on all ranks.
    """

    def __init__(self, topology: Topology, path: str, earlier: dict[str, Any] | None) -> None:
        """Begin, or go on.

        Args:
            topology: the ranks.
            path: folder or URL of the run, for the file `BAD_SAMPLES_FILE`.
            earlier: `state` in the checkpoint that the run goes on from.
        """
        self._topology = topology
        self._url = f"{path}/{BAD_SAMPLES_FILE}"
        self._earlier = BadSampleTally(**earlier) if earlier else BadSampleTally()
        self._written: dict[str, str] | None = None
        self.total = self._earlier

    def gather(self, mine: BadSampleTally) -> None:
        """Sum up `mine`, those of a rank since its process began; all ranks must call."""
        ranks = [mine]
        if self._topology.world_size > 1:
            # So that all ranks together send no more names than are kept.
            limit = MAX_NAMED // self._topology.world_size + 1
            named = dict(list(mine.samples.items())[:limit])
            ranks = [mine] * self._topology.world_size
            dist.all_gather_object(
                ranks, BadSampleTally(mine.seen, mine.count, named), group=self._topology.host_group
            )
        self.total = BadSampleTally()
        for part in [self._earlier, *ranks]:
            self.total.merge(part)
        if self._topology.is_first and self.total.samples != self._written:
            try:
                self._write()
            except Exception as error:  # a full disk, a store; the checkpoint has the names, too
                log.error("%s cannot be written, will go on trying: %s", self._url, error)

    def state(self) -> dict[str, Any]:
        """What `__init__` needs to go on, as of the last `gather`; JSON-able."""
        return {"seen": self.total.seen, "count": self.total.count, "samples": self.total.samples}

    def _write(self) -> None:
        """Replace the file; it has a line for each location."""
        with atomic_write(self._url) as stream:
            for location, reason in self.total.samples.items():
                line = json.dumps({"place": location, "reason": reason}, ensure_ascii=False)
                stream.write(line.encode(errors="backslashreplace") + b"\n")
        self._written = dict(self.total.samples)
