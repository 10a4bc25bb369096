"""What a person types, and Ray: the `mhe` command, job submission, Ray Train workers.

These names are the door for people who import; docs/library.md shows them at work. A name is
imported when it is used, so `import launcher` alone is quick and brings neither torch nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhe_dist.lazy import lazy_names

if TYPE_CHECKING:
    from launcher.api import submit, train
    from launcher.ray_cluster.jobs import Cluster, Job
    from launcher.signals import Interrupted
    from mhe_dist.errors import Preempted, RunError, UserError

_MODULES = {
    "Cluster": "launcher.ray_cluster.jobs",
    "Interrupted": "launcher.signals",
    "Job": "launcher.ray_cluster.jobs",
    "Preempted": "mhe_dist.errors",
    "RunError": "mhe_dist.errors",
    "UserError": "mhe_dist.errors",
    "submit": "launcher.api",
    "train": "launcher.api",
}
__all__ = [
    "Cluster",
    "Interrupted",
    "Job",
    "Preempted",
    "RunError",
    "UserError",
    "submit",
    "train",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
