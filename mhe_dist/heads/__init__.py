"""The classifiers over all classes, behind one contract."""

from __future__ import annotations

from collections.abc import Callable

from mhe_dist.heads.base import Head
from mhe_dist.heads.full import Full
from mhe_dist.heads.mhc import MultiHeadCascade
from mhe_dist.heads.mhp import MultiHeadProduct
from mhe_dist.heads.mhs_gather import MhsGather
from mhe_dist.heads.mhs_route import MhsRoute
from mhe_dist.heads.partial_fc import PartialFc
from mhe_dist.heads.rows import HeadSpec
from mhe_dist.topology import Topology

KINDS: dict[str, Callable[[HeadSpec, Topology], Head]] = {
    "full": Full,
    "partial_fc": PartialFc,
    "mhs": MhsRoute,
    "mhp": MultiHeadProduct,
    "mhc": MultiHeadCascade,
}


def build(spec: HeadSpec, topology: Topology) -> Head:
    """The head that `spec.config.kind` names; all ranks must call."""
    if spec.config.kind == "mhs" and spec.config.mhs.exchange == "gather":
        return MhsGather(spec, topology)
    return KINDS[spec.config.kind](spec, topology)
