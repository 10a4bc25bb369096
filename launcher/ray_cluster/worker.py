"""What runs on each Ray worker: its log file, then `pipelines.pretrain.main`."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path
from typing import Any

from launcher.ray_cluster import ray_internals
from launcher.ray_cluster.crash_log import begin_line, find_crash, killed_by_backbone
from launcher.ray_cluster.mailbox import CRASHED, EventSender, errors_scrubbed, watch_stop
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_from_dict
from mhe_dist.errors import Preempted, RunError, UserError, is_final
from mhe_dist.redact import ScrubbingFormatter, scrub
from pipelines.pretrain import garbage, preemption

logger = logging.getLogger(__name__)


@errors_scrubbed((UserError, RunError, Preempted))  # Ray writes them into logs of its own
def train_worker(settings: dict[str, Any]) -> None:
    """Run this worker's rank of the run.

    Args:
        settings: `config` (the resolved config as a dict), `folder` (the driver's working
            directory, which relative paths of the config refer to), `logs` (folder of the log
            files), `command` (see `pipelines.runs.lock.Holder`) and `mailbox` (actor handle).
    """
    import ray
    import ray.train

    context = ray.train.get_context()
    rank = context.get_world_rank()
    if Path(settings["folder"]).is_dir():
        os.chdir(settings["folder"])
    log = Path(settings["logs"]) / f"rank_{rank}.log"
    crash = find_crash(log, settings["command"])  # of the process that this one replaces
    redirect_output(log, settings["command"])
    send = EventSender(settings["mailbox"])
    if context.get_local_rank() == 0:  # what one rank hears, it tells the others before each step
        watch_stop(settings["mailbox"], preemption.request, ray_internals.is_draining)
    try:
        if not ray.get(settings["mailbox"].begin.remote()):
            raise Preempted("told to stop before it began; nothing is lost")
        if crash:
            _report_crash(crash, rank, send)
        _train(config_from_dict(settings["config"]), send, settings["command"])
    except Preempted as stop:
        logger.warning("rank %d: %s", rank, stop)
        send({"event": "preempted", "rank": rank, "message": str(stop)})
        raise
    except Exception as error:
        logger.exception("rank %d failed", rank)
        send({"event": "failed", "rank": rank, **_describe(error)})
        raise
    finally:
        send.flush()


def _train(config: Config, send: EventSender, command: str) -> None:
    with garbage.put_off():
        from pipelines.pretrain.main import run_pretraining

    run_pretraining(config, on_event=send, command=command)


def _report_crash(crash: str, rank: int, send: EventSender) -> None:
    """Tell how the rank's last process ended.

    Raises:
        UserError: the network itself killed it, and would kill this one.
    """
    if killed_by_backbone(crash):
        raise UserError(
            f"model.name: the network cannot be trained on this machine: its process was {crash}"
        )
    failed = {"message": crash, "kind": CRASHED, "user": False, "final": False}
    send({"event": "failed", "rank": rank, **failed})


def _describe(error: Exception) -> dict[str, Any]:
    """What the driver must know: a `final` failure would come back after every restart."""
    return {
        "message": scrub(str(error)) or type(error).__name__,
        "kind": type(error).__name__,
        "user": isinstance(error, UserError),
        "final": is_final(error),
    }


def redirect_output(file: Path, command: str = "") -> None:
    """Append all further output of this process, that of native libraries too, to `file`.

    If a signal kills it, the file says where Python was (`crash_log.find_crash` reads that).
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    faulthandler.enable(2, all_threads=False)
    os.write(2, f"{begin_line(command)}\n".encode())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ScrubbingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
