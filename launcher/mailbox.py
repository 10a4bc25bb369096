"""How workers, driver and `mhe stop` speak: a small Ray actor that holds events and a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
NAMESPACE = "mhe"
STOP_NOW = "stop_now"
"""The event by which the driver hears that it must not wait for a checkpoint."""


def name_of(path: str) -> str:
    """The mailbox's name in a cluster: one run, wherever it was started, has one mailbox."""
    return f"mailbox:{path}"


class Mailbox:
    """The actor: workers put events in, the driver takes them out, in order.

    Its methods are coroutines, so that thousands of workers can wait in `stopping` at once.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = asyncio.Event()

    async def put(self, event: Event) -> None:
        """Keep an event until somebody takes it."""
        self._events.append(event)

    async def take(self) -> list[Event]:
        """Hand over the events so far, oldest first, and forget them."""
        events, self._events = self._events, []
        return events

    async def stop(self, now: bool = False) -> None:
        """Ask the workers to save and stop; with `now`, the driver to end without that."""
        if now:
            self._events.append({"event": STOP_NOW})
        self._stop.set()

    async def stopping(self) -> None:
        """Return once somebody has asked the workers to stop."""
        await self._stop.wait()


class Sender:
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

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until everything sent has arrived: a worker's process may end right after."""
        import ray

        if self._last is not None:
            ray.wait([self._last], timeout=timeout_s)


def stop_request(mailbox: Any) -> Callable[[], bool]:
    """A function that says, without waiting, whether the workers were asked to stop."""
    import ray

    asked = mailbox.stopping.remote()
    return lambda: bool(ray.wait([asked], timeout=0)[0])
