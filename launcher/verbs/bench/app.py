"""`mhe bench ...`: a part of the system beside a baseline, measured in the same run."""

from __future__ import annotations

import typer

from launcher.verbs.bench.audit import audit
from launcher.verbs.bench.checkpoint import checkpoint
from launcher.verbs.bench.classifier import classifier
from launcher.verbs.bench.data import data
from launcher.verbs.bench.head import head
from launcher.verbs.bench.index import index
from launcher.verbs.bench.launches import launches
from launcher.verbs.bench.plan import plan
from launcher.verbs.bench.train import train

app = typer.Typer(no_args_is_help=True, help="Measure parts beside what they are compared with.")


@app.callback()
def bench() -> None:
    """Measure parts beside what they are compared with, in one run on this machine."""


app.command("head")(head)
app.command("classifier")(classifier)
app.command("checkpoint")(checkpoint)
app.command("data")(data)
app.command("train")(train)
app.command("launches")(launches)
app.command("index")(index)
app.command("audit")(audit)
app.command("plan")(plan)
