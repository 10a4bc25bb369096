"""The training library: heads, banks, checkpoints and the loop. Knows neither Ray nor tars.

These names are the door for people who import; docs/library.md shows them at work. A name is
imported when it is used, so `import mhe_dist` alone is quick and brings no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhe_dist.lazy import lazy_names

if TYPE_CHECKING:
    from mhe_dist.checkpoint.reader import Checkpoint
    from mhe_dist.checkpoint.store import CheckpointStore
    from mhe_dist.config.data import DataConfig
    from mhe_dist.config.load import load_config
    from mhe_dist.config.schema import Config
    from mhe_dist.distributed.topology import Topology, connect
    from mhe_dist.engine.engine import Engine
    from mhe_dist.errors import RunError, UserError
    from mhe_dist.heads.base import HeadOutput
    from mhe_dist.heads.standalone import StandaloneHead, create_head
    from mhe_dist.train.loop import Loop

_MODULES = {
    "Checkpoint": "mhe_dist.checkpoint.reader",
    "CheckpointStore": "mhe_dist.checkpoint.store",
    "Config": "mhe_dist.config.schema",
    "DataConfig": "mhe_dist.config.data",
    "Engine": "mhe_dist.engine.engine",
    "HeadOutput": "mhe_dist.heads.base",
    "Loop": "mhe_dist.train.loop",
    "RunError": "mhe_dist.errors",
    "StandaloneHead": "mhe_dist.heads.standalone",
    "Topology": "mhe_dist.distributed.topology",
    "UserError": "mhe_dist.errors",
    "connect": "mhe_dist.distributed.topology",
    "create_head": "mhe_dist.heads.standalone",
    "load_config": "mhe_dist.config.load",
}
__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Config",
    "DataConfig",
    "Engine",
    "HeadOutput",
    "Loop",
    "RunError",
    "StandaloneHead",
    "Topology",
    "UserError",
    "connect",
    "create_head",
    "load_config",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
