"""One rank of a run, under torchrun or alone: `python -m pipelines.pretrain CONFIG [KEY=VALUE]`."""

from __future__ import annotations

import sys
import traceback

from pipelines.pretrain import garbage, preemption

INTERRUPTED = 130  # the exit code that shells give to what Ctrl-C ended


def main(arguments: list[str]) -> int:
    """Train, and give the exit code."""
    preemption.listen_for_sigterm()  # before the seconds that the imports take
    try:
        return _train(arguments)
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from the newest complete checkpoint",
            file=sys.stderr,
        )
        return INTERRUPTED


def _train(arguments: list[str]) -> int:
    with garbage.put_off():
        from mhe_dist.config.load import load_config
        from mhe_dist.distributed.device import prepare_rank
        from mhe_dist.errors import Preempted, UserError
        from mhe_dist.redact import scrub
        from pipelines.pretrain.main import run_pretraining

    try:
        if preemption.requested():
            raise Preempted("told to stop before it began; nothing is lost")
        config = load_config(arguments[0], arguments[1:])
        prepare_rank(config.scale.gpu)
        run_pretraining(config, lambda event: print(event, flush=True))
    except UserError as error:
        print(f"error: {scrub(str(error))}", file=sys.stderr)
        return 2
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except Exception:  # told as Python would, but without secrets
        sys.stderr.write(scrub(traceback.format_exc()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
