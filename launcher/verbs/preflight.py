"""`mhe preflight`: whether a run would work on a cluster or here, and what it would cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.preflight.checks import check_names
from launcher.preflight.predict import prediction_rows
from launcher.preflight.survey import assess, survey_cluster, survey_machine
from launcher.ray_cluster.code_package import with_absolute_paths
from launcher.ray_cluster.jobs import Cluster
from launcher.terminal import console
from launcher.verbs.config import explain_auto
from launcher.verbs.options import ConfigFile, Overrides
from mhe_dist.config.load import load_config


def preflight(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(help="Dashboard of a cluster; left out: this machine.")
    ] = "",
    trial: Annotated[
        bool, typer.Option(help="Try a few steps, to predict memory and time.")
    ] = True,
) -> None:
    """Say whether a run would work, with every reason why not, and what it would cost.

    Each node is asked for its versions and devices and whether it reaches data, results and
    MLflow. Then the workers of one node try a few steps together, and nothing of that is kept.

    Example: mhe preflight quickstart --address http://127.0.0.1:8265
    """
    settings = with_absolute_paths(load_config(config, overrides or [], [check_names]))
    events = (
        survey_cluster(settings, Cluster(address), trial)
        if address
        else survey_machine(settings, trial)
    )
    prediction = assess(settings, events, trial)
    if prediction:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in prediction_rows(prediction):
            table.add_row(name, escape(value))
        console.print_table(table)
    elif trial:
        console.say("No prediction: the data set is made when the run begins.")
    if head := (prediction.head if prediction else explain_auto(settings)):
        console.say(escape(head))
    console.say("Nothing stands in the way.")
    words = [config, *(overrides or [])]
    train = ["mhe", "submit", *words, "--address", address] if address else ["mhe", "train", *words]
    console.list_next([("train", train)])
