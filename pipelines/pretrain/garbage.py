"""When Python looks for garbage in a rank: not while it starts, and not in all that it holds.

A collection of the oldest objects walks through every one of the process. What torch, timm and
DeepSpeed are made of is a million of them: up to a second, ten times while a rank starts, and
during training at some step of one rank, for which all others wait.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off() -> Iterator[None]:
    """Within a `with` block, which makes things to stay, nothing is collected."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def of_new_objects() -> Iterator[None]:
    """Within a `with` block, only what is made in it is looked at.

    A program that has taken its objects out itself (`gc.freeze`) keeps them so, and no others are:
    that is what it did if most of them are out, since Python 3.12 itself takes out a few hundred.
    """
    if gc.get_freeze_count() > len(gc.get_objects()):
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
