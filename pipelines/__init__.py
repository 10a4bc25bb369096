"""Data in, models out: assembles runs from the training library and the data pipeline.

These names are the door for people who import; docs/library.md shows them at work. A name is
imported when it is used, so `import pipelines` alone is quick and brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.data.order import Order
    from pipelines.loader.loader import Loader
    from pipelines.pretrain import pretrain
    from pipelines.shards.index import ShardIndex
    from pipelines.shards.writer import Sample, ShardWriter

# `pretrain` is its own module, see there.
_MODULES = {
    "Loader": "pipelines.loader.loader",
    "Order": "pipelines.data.order",
    "Sample": "pipelines.shards.writer",
    "ShardIndex": "pipelines.shards.index",
    "ShardWriter": "pipelines.shards.writer",
}
__all__ = [
    "Loader",
    "Order",
    "Sample",
    "ShardIndex",
    "ShardWriter",
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
