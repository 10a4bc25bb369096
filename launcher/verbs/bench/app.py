"""`mhe bench ...`: measurements side by side, ratios of one run."""

from __future__ import annotations

import typer

from launcher.verbs.bench import checkpoint as bench_checkpoint
from launcher.verbs.bench import data as bench_data
from launcher.verbs.bench import head as bench_head

app = typer.Typer(no_args_is_help=True, help="Measure parts beside what they are compared with.")


@app.callback()
def bench() -> None:
    """Measure parts beside what they are compared with, in one run on this machine."""


app.command("head")(bench_head.head)
app.command("checkpoint")(bench_checkpoint.checkpoint)
app.command("data")(bench_data.data)
