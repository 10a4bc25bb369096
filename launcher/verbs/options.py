"""Options and arguments that several verbs have, with one meaning."""

from __future__ import annotations

from typing import Annotated

import typer

CONFIG = typer.Argument(
    metavar="CONFIG", help="YAML file of the run, or a name that comes with mhe: quickstart."
)
ConfigFile = Annotated[str, CONFIG]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the file."),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Folder or URL of a run, its name in runs/, or a step_* checkpoint."
    ),
]
GpuOption = Annotated[bool | None, typer.Option(help="Compute on a GPU; left out: as the run did.")]
Processes = Annotated[
    int, typer.Option(min=0, help="How many work at the same time; 0: one per core.")
]
AddressOption = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="Spread the work over the nodes of this Ray cluster (auto: the one of this node). "
        "Paths are those of a file system that all nodes mount.",
    ),
]
