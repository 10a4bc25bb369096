"""The head that a config names."""

from __future__ import annotations

from collections.abc import Callable

from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import Head
from mhe_dist.heads.gathered.full import Full
from mhe_dist.heads.gathered.mhs import MhsGather
from mhe_dist.heads.gathered.partial_fc import PartialFc
from mhe_dist.heads.multilevel.cascade import MultiHeadCascade
from mhe_dist.heads.multilevel.product import MultiHeadProduct
from mhe_dist.heads.routed.mhs import MhsRoute
from mhe_dist.heads.row_head import HeadSpec

KINDS: dict[str, Callable[[HeadSpec, Topology], Head]] = {
    "full": Full,
    "partial_fc": PartialFc,
    "mhs": MhsRoute,
    "mhp": MultiHeadProduct,
    "mhc": MultiHeadCascade,
}


def build_head(spec: HeadSpec, topology: Topology) -> Head:
    """The head that `spec.config.kind` names; all ranks must call."""
    if spec.config.kind == "mhs" and spec.config.mhs.exchange == "gather":
        return MhsGather(spec, topology)
    return KINDS[spec.config.kind](spec, topology)
