"""Keys of the config that a verb which trains many runs sets itself, and who set a wrong one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from mhe_dist.config.mistakes import ConfigErrors, source_of
from mhe_dist.errors import UserError

_OWN: Final = ("run", "run.name", "run.dir")


def refuse_run_keys(words: Iterable[str], source: str) -> None:
    """Refuse a name or a folder of the run: it would be lost, or be that of every run.

    Args:
        words: keys, or `key=value` each.
        source: where they were given.

    Raises:
        UserError: names the key.
    """
    for word in words:
        key = word.partition("=")[0]
        if key in _OWN:
            raise UserError(
                f"{key} ({source}): each run gets a name of its own, in the folder of --out; leave "
                f"{key} out"
            )


@contextmanager
def mistakes_named(sources: Mapping[str, str]) -> Iterator[None]:
    """Name where keys were set, for those that reach the config as if they had been typed.

    Args:
        sources: file or option by the dotted path of the key.

    Raises:
        ConfigErrors: that of the block, with these sources.
    """
    try:
        yield
    except ConfigErrors as errors:
        raise ConfigErrors(
            [
                each._replace(source=source_of(each.path, sources) or each.source)
                for each in errors.mistakes
            ]
        ) from None
