"""The classifiers over all classes, behind one contract."""

from __future__ import annotations

from mhe_dist.heads.base import Head
from mhe_dist.heads.mhs import MhsRoute
from mhe_dist.heads.rows import HeadSpec
from mhe_dist.topology import Topology


def build(spec: HeadSpec, topology: Topology) -> Head:
    """The head that `spec.config.kind` names; all ranks must call."""
    return MhsRoute(spec, topology)
