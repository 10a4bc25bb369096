"""What a submitted job runs on the cluster: `python -m launcher.job run CONFIG`.

Its log holds an event per line (`event_lines.py`) and, last of all, the error if there was one.
Exit codes are those of `mhe`, and 75 for a run that was asked to stop and has saved.
"""

from __future__ import annotations

import sys
import traceback

from launcher import checks, execute, runs
from launcher.event_lines import EventLines
from launcher.interrupts import Interrupted
from launcher.mailbox import NAMESPACE, name_of
from mhe_dist import config_load
from mhe_dist.errors import Stopped, UserError
from mhe_dist.redact import scrub

CLUSTER = "auto"  # the one that started this process


def main(arguments: list[str]) -> int:
    """Run a job's command, `run CONFIG` or `stop-now PATH`, and give its exit code."""
    verb, argument = arguments
    try:
        (stop_now if verb == "stop-now" else run)(argument)
    except Stopped as stop:
        return stop.exit_code
    except Interrupted as stop:
        return stop.exit_code
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        name = "" if type(error).__module__ == "mhe_dist.errors" else f"{type(error).__name__}: "
        sys.stderr.write(f"error: {name}{scrub(str(error))}\n")
        return 2 if isinstance(error, UserError) else 1
    return 0


def run(file: str) -> None:
    """Train, evaluate and export the run of a YAML file on this cluster."""
    config = config_load.load(file, checks=[checks.data, checks.backbone])
    checks.refuse_another_run(config)
    lines = EventLines(sys.stdout)
    if (done := runs.summary(config.run.path)) is not None:
        lines.handle({"event": "end", "summary": done})
        return
    execute.run(config, lines, CLUSTER)


def stop_now(path: str) -> None:
    """Tell the driver of the run at `path` not to wait for a checkpoint."""
    import ray

    ray.init(CLUSTER, namespace=NAMESPACE, log_to_driver=False)
    try:
        ray.get(ray.get_actor(name_of(path)).stop.remote(now=True))
    except ValueError:  # no such actor: the run has ended, or has not begun
        sys.stderr.write(f"no run at {path} is being trained\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
