"""`ray start` on a busy machine: a node that does not wait for its agents."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # what the node starts inherits no PYTHONPATH

from ray.scripts.scripts import main

from launcher.ray_cluster.ray_internals import agents_not_awaited

if __name__ == "__main__":
    with agents_not_awaited():
        main()
