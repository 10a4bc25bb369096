"""A pretraining run on one rank, from the config to the exported backbone.

The package can be called, too: `pipelines.pretrain(config)` makes a whole run in this process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhe_dist.config.load import ConfigLike

__all__ = ("pretrain",)


def pretrain(
    config: ConfigLike,
    overrides: Sequence[str] = (),
    *,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **sections: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, evaluate and export in this process; go on where the newest checkpoint ends.

    Under `torchrun` each process calls it and is one rank; the data must be there then. Alone it
    makes the glyph data set of `data.glyphs` first, if it is missing.

    Args:
        config: a YAML file or the name of one that comes with mhe, a dict of sections, a `Config`.
        overrides: `section.key=value` each, as on the command line.
        on_event: called with the events of the run, plain dicts, on rank 0; such as `print`.
        **sections: keys of some sections, such as `train={"max_steps": 100}`.

    Returns:
        The summary of the run, also in its `summary.json`.

    Raises:
        UserError: the config is wrong or does not fit the data, or another process trains this run.
        RunError: the run failed.
        Preempted: the process was asked to stop; the run is saved and goes on when called again.
    """
    from mhe_dist.config.load import resolve_config
    from pipelines.pretrain.main import run_pretraining
    from pipelines.sources.glyphs.build import ensure_glyphs

    found = resolve_config(config, overrides, **sections)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # ranks would write over one another
        # In this process: others would begin by running the caller's script once more.
        ensure_glyphs(found.data)
    return run_pretraining(found, on_event) if on_event else run_pretraining(found)


class _CallablePackage(ModuleType):
    """A package that is a function at the same time."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `pretrain`."""
        return pretrain(*args, **kwargs)


# `pipelines.pretrain(config)` is the natural name of the call, and `python -m pipelines.pretrain`
# needs a package of that name. Importing a submodule binds the package over any function, so the
# package itself must be callable; Python allows to set the class of a module for such uses.
sys.modules[__name__].__class__ = _CallablePackage
