"""The hub that timm downloads weights from: asked only while it answers."""

from __future__ import annotations

import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

ANSWER_S = 3.0


@contextmanager
def prompt_hub() -> Iterator[None]:
    """Within it the hub's cache alone is read where the hub does not answer.

    Its own client would try for a minute, each time that a file is not in the cache.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def answers(url: str, timeout_s: float = ANSWER_S) -> bool:
    """Whether a server answers within some seconds, whatever it says."""
    found: queue.Queue[bool] = queue.Queue()
    # A thread, because the look-up of a name has no time limit of its own.
    threading.Thread(target=lambda: found.put(_request(url, timeout_s)), daemon=True).start()
    try:
        return found.get(timeout=timeout_s)
    except queue.Empty:
        return False


def _request(url: str, timeout_s: float) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
