"""How workers, driver and Ray's controller talk: a small Ray actor with events and requests."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from launcher.events import Event
from mhe_dist.errors import RunError
from mhe_dist.redact import scrub, scrub_urls

_FLUSH_S: Final = 30.0  # that a worker waits at its end for what it has sent

logger = logging.getLogger(__name__)

NAMESPACE = "mhe"
STOP_NOW = "stop_now"
"""The event that tells the driver not to wait for a checkpoint."""


CRASHED = "Signal"
"""The kind of a failure that a worker reports of the process that it replaces."""


def ends_group(event: Event) -> bool:
    """Whether an event tells that its worker ends, and so its group of workers."""
    failed = event["event"] == "failed" and event["kind"] != CRASHED
    return failed or event["event"] == "preempted"


def mailbox_name(path: str) -> str:
    """Name of the mailbox of the run at `path`; wherever a run was started, it has one mailbox.

    Ray shows names of actors, so it has no credentials of a URL; nor do they make another run.
    """
    return f"mailbox:{scrub_urls(path)}"


@contextmanager
def errors_scrubbed(kept: tuple[type[Exception], ...]) -> Iterator[None]:
    """Let no error out whose traceback has a secret: it goes into logs that are not ours.

    Another one of the same message without secrets takes its place.

    Args:
        kept: kinds that are made of their message alone and stay what they are; any other becomes
            a `RunError` that names its kind.
    """
    try:
        yield
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        if scrub(text) == text:
            raise
        if type(error) in kept:
            raise type(error)(scrub(str(error))) from None
        raise RunError(f"{type(error).__name__}: {scrub(str(error))}") from None


class Mailbox:
    """The actor: workers put events in, the driver takes them out, in order."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = self._leaving = False
        self._training = False
        self._saved_step = 0

    def begin(self) -> bool:
        """A worker is about to train: whether it may, as nobody asked the run to stop."""
        self._leaving = False  # that was asked of the group before
        self._training = self._training or not self._stopping
        return not self._stopping

    def stop(self, now: bool = False) -> bool:
        """Ask the workers to save the run and leave; with `now`, the driver to end without that.

        Returns:
            Whether there are workers that may have something to save, and will answer.
        """
        if now:
            self._events.append({"event": STOP_NOW})
        self._stopping = True
        return self._training

    def stopping(self) -> bool:
        """Whether the driver asked the workers to stop."""
        return self._stopping

    def leave(self) -> None:
        """Ask the workers to save and leave, so that another group takes their place."""
        self._leaving = True

    def leaving(self) -> bool:
        """Whether the workers of now are asked to save and leave, for whatever reason."""
        return self._stopping or self._leaving

    def saved_step(self) -> int:
        """The furthest step of which there is a checkpoint; 0: none of this command."""
        return self._saved_step

    def training(self) -> bool:
        """Whether a worker has begun to train, and none of its group has left since."""
        return self._training

    def put(self, event: Event) -> None:
        """Keep an event until somebody takes it."""
        self._events.append(event)
        if event["event"] == "checkpoint":
            self._saved_step = max(self._saved_step, event["step"])
        if ends_group(event):
            self._training = False  # another group may follow

    def take(self) -> list[Event]:
        """Hand over the events so far, oldest first, and forget them."""
        events, self._events = self._events, []
        return events


class EventSender:
    """A worker's end of the mailbox; sending never waits for the driver.

    Args:
        mailbox: handle of the `Mailbox` actor.
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._last: Any = None

    def __call__(self, event: Event) -> None:
        """Send an event."""
        self._last = self._mailbox.put.remote(event)

    def flush(self) -> None:
        """Wait until everything sent has arrived: a worker's process may end right after."""
        import ray

        if self._last is not None:
            ray.wait([self._last], timeout=_FLUSH_S)


class ControllerMailbox:
    """The end of the mailbox that Ray's controller has, which starts groups of workers.

    Args:
        mailbox: handle of the `Mailbox` actor. When it does not answer, there is no news.
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._saved_step = 0

    def stopping(self) -> bool:
        """Whether the run was asked to stop; also when the driver is gone."""
        import ray

        try:
            return bool(ray.get(self._mailbox.stopping.remote()))
        except ray.exceptions.ActorDiedError:
            return True
        except ray.exceptions.RayError:
            return False

    def has_new_checkpoint(self) -> bool:
        """Whether there is a checkpoint of a later step than when this was asked before."""
        import ray

        before = self._saved_step
        with suppress(ray.exceptions.RayError):
            self._saved_step = ray.get(self._mailbox.saved_step.remote())
        return self._saved_step > before

    def ask_to_leave(self, purpose: str) -> None:
        """Let the workers save and leave, and say for what."""
        self.announce(f"saving, then {purpose}")
        self._mailbox.leave.remote()

    def announce(self, what: str) -> None:
        """Tell whoever watches what the run waits for."""
        self._mailbox.put.remote({"event": "waiting", "what": what})


def watch_stop(
    mailbox: Any,
    stop: Callable[[], None],
    draining: Callable[[], bool] = lambda: False,
    every_s: float = 1.0,
) -> None:
    """Start a thread that calls `stop` once this process's group is asked to save and leave.

    Args:
        mailbox: handle of the `Mailbox` actor, which is asked every `every_s` seconds.
        stop: called once, on that thread.
        draining: whether a node of the group will be taken away; asked as often.
        every_s: seconds between two questions.
    """
    import ray

    def _poll() -> None:
        waiting = threading.Event()
        while not draining():
            try:
                if ray.get(mailbox.leaving.remote()):
                    break
            except ray.exceptions.ActorDiedError:  # with the driver: the cluster ends this process
                return
            except ray.exceptions.RayError as error:
                logger.warning("the mailbox does not answer now: %s", error)
            waiting.wait(every_s)
        stop()

    threading.Thread(target=_poll, name="watch stop", daemon=True).start()
