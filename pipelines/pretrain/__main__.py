"""One rank of a run, under torchrun or alone: `python -m pipelines.pretrain CONFIG [KEY=VALUE]`."""

from __future__ import annotations

import sys

from mhe_dist.config.load import load_config
from mhe_dist.distributed.device import prepare_rank
from mhe_dist.errors import Preempted, UserError
from pipelines.pretrain import preemption
from pipelines.pretrain.main import run_pretraining

if __name__ == "__main__":
    preemption.listen_for_sigterm()
    try:
        config = load_config(sys.argv[1], sys.argv[2:])
        prepare_rank(config.scale.gpu)
        run_pretraining(config, lambda event: print(event, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
