"""Data in, models out: assembles runs from the training library and the data pipeline.

These names are the door for people who import; docs/library.md shows them at work. A name is
imported when it is used, so `import pipelines` alone is quick and brings no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhe_dist.lazy import lazy_names

if TYPE_CHECKING:
    from pipelines.data.order import SampleOrder
    from pipelines.loader.loader import Loader
    from pipelines.pretrain import pretrain
    from pipelines.runs.arrays import embed_arrays
    from pipelines.runs.checkpoints import class_centres, open_checkpoint
    from pipelines.runs.trained import TrainedBackbone, load_trained_backbone
    from pipelines.shards.index import ShardIndex
    from pipelines.shards.writer import Sample, ShardWriter

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
    "pretrain": "pipelines.pretrain",  # a module that can be called, see there
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

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
