"""What a run is evaluated on while it trains: held-out shards, verification sets, or both."""

from __future__ import annotations

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from pipelines.evaluate import heldout
from pipelines.evaluate.embeddings import Embed
from pipelines.evaluate.heldout import Evaluation
from pipelines.evaluate.pair_sets import load_bins, verify


def wanted(config: Config) -> bool:
    """Whether the config asks for an evaluation."""
    return bool(config.evaluate.shards or config.evaluate.verification)


def run(embed: Embed, config: Config, topology: Topology) -> Evaluation:
    """Evaluate on everything that the config names; all ranks must call and all get the metrics.

    Beside the metrics of `heldout.run` there are `lfw/accuracy` and so on for each `.bin` set. All
    ranks embed; what the first one does alone takes milliseconds, so there is no bootstrap here
    (`mhe evaluate verification` has it).

    Raises:
        UserError: a set cannot be used.
    """
    found = Evaluation({}, {})
    if config.evaluate.shards:
        found = heldout.run(embed, config, topology)
    if not config.evaluate.verification:
        return found
    sets = load_bins(config.evaluate.verification)
    results = verify(embed, sets, topology, config.data.image_size, with_intervals=False)
    figures = {name: value for each in results for name, value in each.flat().items()}
    return Evaluation(found.metrics | heldout.from_first(figures, topology), found.details)
