"""What goes wrong for tests: a full disk, and somebody who does not wait."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any


def disk_full(*_: object, **__: object) -> Any:
    """Fail as a call does that writes where there is no room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt_at(number: int) -> Callable[[int, int], None]:
    """A display of progress; somebody presses Ctrl-C when it shows that so many are done."""

    def show(done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return show
