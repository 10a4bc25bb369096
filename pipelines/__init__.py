"""Data in, models out: assembles runs from the training library and the data pipeline.

These names are the door for people who import; docs/library.md shows them at work. A name is
imported when it is used, so `import pipelines` alone is quick and brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.data.order import SampleOrder
    from pipelines.loader.loader import Loader
    from pipelines.pretrain import pretrain
    from pipelines.runs.arrays import embed_arrays
    from pipelines.runs.checkpoints import class_centres, open_checkpoint
    from pipelines.runs.trained import TrainedBackbone, load_trained_backbone
    from pipelines.shards.index import ShardIndex
    from pipelines.shards.writer import Sample, ShardWriter

# `pretrain` is its own module, see there.
_MODULES = {
    "Loader": "pipelines.loader.loader",
    "Sample": "pipelines.shards.writer",
    "SampleOrder": "pipelines.data.order",
    "ShardIndex": "pipelines.shards.index",
    "ShardWriter": "pipelines.shards.writer",
    "TrainedBackbone": "pipelines.runs.trained",
    "class_centres": "pipelines.runs.checkpoints",
    "embed_arrays": "pipelines.runs.arrays",
    "load_trained_backbone": "pipelines.runs.trained",
    "open_checkpoint": "pipelines.runs.checkpoints",
}
__all__ = [
    "Loader",
    "Sample",
    "SampleOrder",
    "ShardIndex",
    "ShardWriter",
    "TrainedBackbone",
    "class_centres",
    "embed_arrays",
    "load_trained_backbone",
    "open_checkpoint",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name == "pretrain":
        return import_module("pipelines.pretrain")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
