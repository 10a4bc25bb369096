"""How well a head should find unseen classes beside others, from its settings alone.

The reasons of `head_sizes`, as a number to rank heads by: `mhe reproduce heads` measured how far it
holds (`tools/head_ranking.py`, docs/choosing.md).
"""

from __future__ import annotations

from math import log10
from typing import Final

from mhe_dist.config.auto.head_sizes import HeadDemand, count_classes_seen
from mhe_dist.config.head import HeadConfig

ALWAYS_MET: Final = 0.5
"""What it adds if a sample's negatives are the same in each step: as three times the classes do."""
DIGITS: Final = {"mhp": 0.0, "mhc": 1.0}
"""Heads of digits: below all that have a row for each class; MHC has rows for prefixes."""


def score_head(head: HeadConfig, demand: HeadDemand) -> float:
    """The logarithm of the classes that a sample meets, and how much of its negatives returns.

    A head that meets S of the R classes that it can ever meet has its rows in a share S / R of the
    steps: all, with one own head or a whole group; a tenth, with PartialFC 0.1.

    Args:
        head: its block of the config, with numbers.
        demand: what it is used for.
    """
    if head.kind in DIGITS:
        return DIGITS[head.kind]
    seen, reach = _classes(head, demand)
    return log10(seen) + ALWAYS_MET * seen / reach


def _classes(head: HeadConfig, demand: HeadDemand) -> tuple[float, float]:
    """Classes that a sample meets in a step, and in any step."""
    every = demand.classes
    seen = count_classes_seen(head, demand, head.chosen_groups)
    if head.kind != "mhs":
        return seen, every
    if head.mhs.negatives == "batch" or head.mhs.repartition_every:
        return seen, every
    if head.mhs.negatives == "own" or not head.mhs.chosen_extra_heads:
        return seen, seen
    routed = head.mhs.exchange == "route"
    return seen, max(seen, every // head.chosen_groups if routed else every)
