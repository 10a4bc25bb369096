"""One rank of a run, under torchrun or alone: `python -m pipelines.pretrain CONFIG [KEY=VALUE]`."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mhe_dist.errors import INTERRUPTED
from pipelines.pretrain import garbage, preemption


def main(arguments: list[str]) -> int:
    """Train, and give the exit code."""
    preemption.listen_for_sigterm()  # before the seconds that the imports take
    with _noting_interrupts() as interrupts:
        try:
            return _train(arguments, interrupts)
        except KeyboardInterrupt:
            print(
                "interrupted; the same command goes on from the newest complete checkpoint",
                file=sys.stderr,
            )
            return INTERRUPTED


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Inside, Ctrl-C raises as it does anyway; what comes of it elsewhere can be told from faults.

    It ends the loader's processes, too, and their end may be noticed first; and what is torn apart
    while it is made complains of that when it is deleted.
    """
    received: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        """Raise; should a finalizer or a library lose that, the run stops at its next step."""
        received.append(signum)
        preemption.request()
        sys.unraisablehook = lambda _: None
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell's background job has it ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
        preemption.clear()


def _train(arguments: list[str], interrupts: list[int]) -> int:
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
        if interrupts:
            raise KeyboardInterrupt from None
        print(stop, file=sys.stderr)
        return stop.exit_code
    except Exception:  # told as Python would, but without secrets
        if interrupts:
            raise KeyboardInterrupt from None
        sys.stderr.write(scrub(traceback.format_exc()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
