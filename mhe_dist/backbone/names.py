"""Which backbones are mhe's own, known without importing torch."""

from __future__ import annotations


def is_iresnet(name: str) -> bool:
    """Whether a model's name is of `mhe_dist.backbone.iresnet`, which timm does not have."""
    return name.startswith("iresnet")
