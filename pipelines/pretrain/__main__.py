"""One rank of a run, under torchrun or alone: `python -m pipelines.pretrain CONFIG [KEY=VALUE]`."""

from __future__ import annotations

import sys

from mhe_dist.config.load import load_config
from mhe_dist.errors import Preempted
from pipelines.pretrain import preemption
from pipelines.pretrain.main import run_pretraining

if __name__ == "__main__":
    preemption.listen_for_sigterm()
    try:
        run_pretraining(
            load_config(sys.argv[1], sys.argv[2:]), lambda event: print(event, flush=True)
        )
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
